//! Under which addresses others reach this process.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use super::CoordinatorRecord;

/// This process's record. `host` is what was configured; the ports are those that are bound.
pub fn record(host: Option<&str>, http: SocketAddr, grpc: SocketAddr) -> CoordinatorRecord {
    let host = match host {
        Some(host) => host.to_owned(),
        None => first_address(&fs::read_to_string("/proc/net/fib_trie").unwrap_or_default()).to_string(),
    };
    let at = |port| match host.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{host}:{port}"),
    };
    let grpc_address = at(grpc.port());
    CoordinatorRecord {
        coordinator_id: grpc_address.clone(),
        http_address: at(http.port()),
        grpc_address,
        http_speaks_tls: false,
        grpc_speaks_tls: false,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: uuid::Uuid::new_v4().as_u64_pair().0,
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
    }
}

/// This machine's first address that is not for itself alone, from the kernel's table of routes: lines that end with an
/// address, each followed by what it is.
fn first_address(routes: &str) -> Ipv4Addr {
    let mut last = None;
    for line in routes.lines() {
        if let Some((_, address)) = line.split_once("|-- ") {
            last = address.trim().parse::<Ipv4Addr>().ok();
        } else if line.trim() == "/32 host LOCAL"
            && let Some(address) = last.filter(|a| !a.is_loopback())
        {
            return address;
        }
    }
    Ipv4Addr::LOCALHOST
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_for_others_is_found() {
        let routes = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                      \x20    |-- 127.0.0.1\n        /32 host LOCAL\n     |-- 10.1.2.0\n        /24 link UNICAST\n\
                      \x20    |-- 10.1.2.3\n        /32 host LOCAL\n";
        assert_eq!(first_address(routes), Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(first_address("nonsense"), Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn records_have_the_ports_that_are_bound() {
        let address = |a: &str| a.parse().unwrap();
        let given = record(Some("head.local"), address("0.0.0.0:80"), address("0.0.0.0:81"));
        assert_eq!((given.http_address.as_str(), given.grpc_address.as_str()), ("head.local:80", "head.local:81"));
        assert_eq!(given.coordinator_id, "head.local:81");
        let v6 = record(Some("::1"), address("[::1]:80"), address("[::1]:81"));
        assert_eq!(v6.grpc_address, "[::1]:81");
        assert_ne!(given.incarnation, v6.incarnation);
    }
}
