//! Who gets into a group: no stranger, no other epoch, nobody without the secret.

use super::*;

#[test]
fn a_wrong_secret_is_refused() {
    for kind in ["shm", "tcp"] {
        let mut members = members(2, Duration::from_millis(700));
        members[1].config.secret = b"a guess".to_vec();
        let results = run(kind, &members, |_, connected| connected.err());
        for error in results {
            let error = error.expect("a rank with another secret connected").to_string();
            if kind == "tcp" {
                assert!(error.contains("rank") && !error.contains("guess"), "{error}");
            }
        }
    }
}

#[test]
fn a_rank_that_can_not_be_reached_is_not_waited_for() {
    let mut group = members(2, AMPLE);
    let caller = group.pop().expect("two members");
    // Its port is closed from now on.
    drop(group);
    let error = connect(&caller.config, Some(&caller.listener), Some("tcp")).err().expect("nobody is there");
    assert!(error.to_string().contains("can't be reached"), "{error}");
}

#[test]
fn strangers_and_other_epochs_do_not_disturb_connecting() {
    let group = members(3, AMPLE);
    // Connections that wait in the listener's queue before rank 0 looks at it: silent, noisy, and of an older epoch.
    let address = group[0].config.peers[0].address.clone();
    let silent: Vec<_> = (0..5).map(|_| TcpStream::connect(&address).expect("it listens")).collect();
    let mut noisy = TcpStream::connect(&address).expect("it listens");
    noisy.write_all(&[b'x'; 500]).expect("the socket takes it");
    let old = CollectiveConfig {
        epoch: group[0].config.epoch - 1,
        rank: 2,
        time_limit: Duration::from_millis(400),
        ..group[2].config.clone()
    };
    let refused = thread::scope(|scope| {
        let refused = scope.spawn(|| connect(&old, None, Some("tcp")).err());
        run("tcp", &group, |_, connected| check_sum(&mut *connected.expect("strangers do not matter"), 576, 0));
        refused.join().expect("it returns")
    });
    assert!(matches!(refused, Some(CollectiveError::Setup { .. } | CollectiveError::Timeout { .. })), "{refused:?}");
    drop(silent);
    // A caller of a wrong protocol is hung up on.
    let mut rest = Vec::new();
    let _ = noisy.read_to_end(&mut rest);
    assert!(rest.is_empty());
}

#[test]
fn the_listener_serves_one_epoch_after_another() {
    let mut group = members(3, AMPLE);
    for _ in 0..3 {
        run("tcp", &group, |_, connected| check_sum(&mut *connected.expect("all ranks are here"), 7, 0));
        group.iter_mut().for_each(|member| member.config.epoch += 1 << 50);
    }
}

#[test]
fn a_formed_group_has_no_file() {
    let group = members(4, AMPLE);
    run("shm", &group, |_, connected| {
        let collective = connected.expect("all ranks are here");
        assert_eq!(shared_memory_files(group[0].config.epoch), Vec::<String>::new());
        drop(collective);
    });
}
