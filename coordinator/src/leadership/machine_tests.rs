use super::*;

const TTL: Duration = Duration::from_millis(3000);

fn record(id: &str) -> CoordinatorRecord {
    CoordinatorRecord { coordinator_id: id.to_owned(), incarnation: 1, ..CoordinatorRecord::default() }
}

fn holder(id: &str, term: u64) -> Option<Leader> {
    Some(Leader { record: record(id), term })
}

/// A machine, and a clock that moves when told.
struct Bench {
    now: Instant,
    machine: Machine,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        Self { now, machine: Machine::new(now, record("me"), TTL, false) }
    }

    /// One that leads in term 5.
    fn leading() -> Self {
        let mut bench = Self::new();
        bench.seen(None, 4);
        bench.tell(Event::Won { term: 5 });
        bench
    }

    /// What people are not told.
    fn tell(&mut self, event: Event) -> Vec<Action> {
        let actions = self.machine.step(self.now, event);
        actions.into_iter().filter(|a| !matches!(a, Action::Warn(_) | Action::Info(_))).collect()
    }

    fn seen(&mut self, holder: Option<Leader>, revision: u64) -> Vec<Action> {
        self.tell(Event::Seen { holder, revision })
    }

    fn after(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.tell(Event::Tick)
    }

    fn term(&self) -> Option<u64> {
        self.machine.session().map(|s| s.term)
    }
}

#[test]
fn a_free_key_is_taken_and_kept() {
    let mut bench = Bench::new();
    assert_eq!(bench.tell(Event::Tick), [Action::Look]);
    assert_eq!(bench.seen(None, 4), [Action::Attempt(Expected::Absent)]);
    assert_eq!(bench.term(), None);
    assert_eq!(bench.tell(Event::Won { term: 5 }), [Action::Publish]);
    assert_eq!(bench.machine.session(), Some(Session { number: 1, term: 5 }));
    // Renewed at a third of its life; then a look, because a lease may outlive its key.
    assert_eq!(bench.after(TTL / 4), []);
    assert_eq!(bench.after(TTL / 12), [Action::Renew { term: 5 }]);
    assert_eq!(bench.after(TTL / 12), [], "one at a time");
    assert_eq!(bench.tell(Event::Renewed { term: 5 }), [Action::Look]);
    assert_eq!(bench.seen(holder("me", 5), 9), []);
    assert_eq!(bench.after(TTL / 3), [Action::Renew { term: 5 }]);
}

#[test]
fn who_comes_second_stands_by_until_the_key_is_free() {
    let mut bench = Bench::new();
    assert_eq!(bench.seen(holder("other", 3), 3), [Action::Publish]);
    assert_eq!(bench.machine.leader(), holder("other", 3));
    assert_eq!(bench.seen(holder("other", 3), 4), []);
    assert_eq!(bench.seen(None, 6), [Action::Attempt(Expected::Absent), Action::Publish]);
    assert_eq!(bench.seen(None, 6), [], "one attempt at a time");
    // A third was faster.
    assert_eq!(bench.tell(Event::Refused), [Action::Look]);
    assert_eq!(bench.seen(holder("third", 7), 7), [Action::Publish]);
    assert_eq!(bench.term(), None);
    // What is older than what is known is no news.
    assert_eq!(bench.seen(None, 6), []);
}

#[test]
fn a_standby_looks_though_the_store_tells_changes() {
    let mut bench = Bench::new();
    bench.tell(Event::Tick);
    bench.seen(holder("other", 3), 3);
    assert!(bench.machine.wake_at() <= bench.now + TTL);
    assert_eq!(bench.after(TTL), [Action::Look]);
    assert_eq!(bench.seen(None, 9), [Action::Attempt(Expected::Absent), Action::Publish]);
}

#[test]
fn a_silent_store_ends_no_leadership() {
    let mut bench = Bench::leading();
    let failed = || Event::RenewalFailed { term: 5, reason: "away".to_owned() };
    for _ in 0..100 {
        let actions = bench.after(TTL / 3);
        assert!(actions.contains(&Action::Renew { term: 5 }), "{actions:?}");
        bench.tell(Event::LookFailed("away".to_owned()));
        assert_eq!(bench.tell(failed()), []);
        assert_eq!(bench.term(), Some(5));
    }
    // It is said once, and once that it is over.
    assert_eq!(bench.machine.step(bench.now, failed()), []);
    let back = bench.machine.step(bench.now, Event::Renewed { term: 5 });
    assert!(matches!(back.as_slice(), [Action::Info(_), Action::Look]), "{back:?}");
    assert_eq!(bench.seen(holder("me", 5), 5), []);
    assert_eq!(bench.term(), Some(5));
}

#[test]
fn a_lost_lease_is_taken_again_without_a_break() {
    let mut bench = Bench::leading();
    assert_eq!(bench.tell(Event::LeaseEnded { term: 5 }), [Action::Attempt(Expected::Absent)]);
    assert_eq!(bench.term(), Some(5), "nobody else leads");
    assert_eq!(bench.tell(Event::Won { term: 8 }), [Action::Publish]);
    assert_eq!(bench.machine.session(), Some(Session { number: 1, term: 8 }));
    // Late news of the old term.
    assert_eq!(bench.tell(Event::LeaseEnded { term: 5 }), []);
    assert_eq!(bench.tell(Event::RenewalFailed { term: 5, reason: String::new() }), []);
    assert_eq!(bench.seen(None, 7), []);
}

#[test]
fn a_leader_that_lost_its_key_steps_down() {
    let mut bench = Bench::leading();
    bench.tell(Event::LeaseEnded { term: 5 });
    assert_eq!(bench.tell(Event::Refused), [Action::Look]);
    assert_eq!(bench.seen(holder("other", 9), 9), [Action::Release { term: 5 }, Action::Publish]);
    assert_eq!((bench.term(), bench.machine.leader()), (None, holder("other", 9)));
    // It leads again when it can: a new session, which shares nothing with the first.
    assert_eq!(bench.seen(None, 11), [Action::Attempt(Expected::Absent), Action::Publish]);
    bench.tell(Event::Won { term: 12 });
    assert_eq!(bench.machine.session(), Some(Session { number: 2, term: 12 }));
}

#[test]
fn an_attempt_whose_answer_was_lost_counts() {
    let mut bench = Bench::new();
    bench.seen(None, 4);
    bench.tell(Event::AttemptFailed("away".to_owned()));
    // As a standby it takes the key from itself: its lease is unknown.
    assert_eq!(bench.seen(holder("me", 5), 5), [Action::Attempt(Expected::Unchanged(5))]);
    bench.tell(Event::Won { term: 6 });
    assert_eq!(bench.term(), Some(6));
    // As a leader it keeps what it has.
    bench.tell(Event::LeaseEnded { term: 6 });
    bench.tell(Event::AttemptFailed("away".to_owned()));
    let actions = bench.seen(holder("me", 8), 8);
    assert_eq!(actions, [Action::Adopt(holder("me", 8).unwrap()), Action::Publish]);
    assert_eq!(bench.machine.session(), Some(Session { number: 1, term: 8 }));
}

#[test]
fn a_dead_leader_is_succeeded_in_the_term_that_was_known() {
    let mut bench = Bench::new();
    bench.seen(holder("other", 3), 3);
    assert_eq!(bench.tell(Event::LeaderDied { term: 2 }), [], "of an older one");
    assert_eq!(bench.tell(Event::LeaderDied { term: 3 }), [Action::Attempt(Expected::Unchanged(3))]);
    assert_eq!(bench.tell(Event::LeaderDied { term: 3 }), []);
    bench.tell(Event::Won { term: 4 });
    assert_eq!(bench.term(), Some(4));
    assert_eq!(bench.tell(Event::LeaderDied { term: 4 }), [], "we live");
}

#[test]
fn a_predecessor_at_our_own_address_is_gone() {
    let now = Instant::now();
    let me = CoordinatorRecord { grpc_address: "a:1".to_owned(), boot_id: "b".to_owned(), ..record("a:1") };
    let before = CoordinatorRecord { incarnation: 7, ..me.clone() };
    let mut machine = Machine::new(now, me, TTL, false);
    let seen = Event::Seen { holder: Some(Leader { record: before, term: 3 }), revision: 3 };
    assert!(machine.step(now, seen).contains(&Action::Attempt(Expected::Unchanged(3))));
    // In a store of our own everybody is.
    let mut alone = Machine::new(now, record("me"), TTL, true);
    let seen = Event::Seen { holder: holder("other", 3), revision: 3 };
    assert!(alone.step(now, seen).contains(&Action::Attempt(Expected::Unchanged(3))));
}

#[test]
fn a_greater_term_is_believed_unless_the_store_knows_better() {
    let mut bench = Bench::leading();
    assert_eq!(bench.tell(Event::Challenged { term: 5 }), []);
    assert_eq!(bench.tell(Event::Challenged { term: 9 }), [Action::Look]);
    assert_eq!(bench.seen(holder("me", 5), 6), []);
    assert_eq!(bench.term(), Some(5), "a claim from another store's life");
    // The store is silent: the claim is all there is.
    bench.tell(Event::Challenged { term: 9 });
    let actions = bench.tell(Event::LookFailed("away".to_owned()));
    assert_eq!(actions, [Action::Release { term: 5 }, Action::Publish]);
    assert_eq!((bench.term(), bench.machine.leader()), (None, None));
    // It was wrong: the key is ours still, and a new term is taken.
    assert_eq!(bench.seen(holder("me", 5), 7), [Action::Attempt(Expected::Unchanged(5))]);
    bench.tell(Event::Won { term: 10 });
    assert_eq!(bench.machine.session(), Some(Session { number: 2, term: 10 }));
}

#[test]
fn stepping_down_leaves_time_for_another() {
    let mut bench = Bench::leading();
    assert_eq!(bench.tell(Event::StepDown), [Action::Release { term: 5 }, Action::Publish]);
    assert_eq!(bench.seen(None, 6), []);
    assert_eq!(bench.after(TTL), [Action::Look]);
    assert_eq!(bench.seen(None, 6), []);
    // Nobody came.
    assert_eq!(bench.after(TTL * 2), [Action::Look]);
    assert_eq!(bench.seen(None, 6), [Action::Attempt(Expected::Absent)]);
}

#[test]
fn who_steps_down_succeeds_its_successor() {
    let mut bench = Bench::leading();
    bench.tell(Event::StepDown);
    bench.seen(holder("other", 7), 7);
    assert_eq!(bench.seen(None, 8), [Action::Attempt(Expected::Absent), Action::Publish]);
}

#[test]
fn who_resigned_never_leads_again() {
    let mut bench = Bench::leading();
    assert_eq!(bench.tell(Event::Resign), [Action::Release { term: 5 }, Action::Publish]);
    assert_eq!(bench.seen(None, 6), []);
    assert_eq!(bench.tell(Event::Won { term: 7 }), [Action::Release { term: 7 }]);
    // It still follows, so that what it has can be forwarded.
    assert_eq!(bench.seen(holder("other", 9), 9), [Action::Publish]);
    assert_eq!(bench.tell(Event::LeaderDied { term: 9 }), []);
}

/// Several machines, one key, and whatever order of events the seed says: the store's own answers are true, but late,
/// lost, or doubled.
mod schedules {
    use std::collections::BTreeMap;

    use super::*;

    /// Schedules that every test run goes through.
    const SEEDS: u64 = 10_000;

    struct Store {
        holder: Option<Leader>,
        revision: u64,
        /// Whether the holder's lease lives.
        terms: Vec<(u64, String)>,
        /// Who led in a term, as the machines saw it.
        leaders: BTreeMap<u64, usize>,
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            // SplitMix64.
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % n as u64) as usize
        }
    }

    impl Store {
        fn attempt(&mut self, me: &CoordinatorRecord, expected: Expected) -> Event {
            let found = match (&self.holder, expected) {
                (None, Expected::Absent) => true,
                (Some(h), Expected::Unchanged(term)) => h.term == term,
                _ => false,
            };
            if !found {
                return Event::Refused;
            }
            self.revision += 1;
            self.holder = Some(Leader { record: me.clone(), term: self.revision });
            self.terms.push((self.revision, me.coordinator_id.clone()));
            Event::Won { term: self.revision }
        }

        fn seen(&self) -> Event {
            Event::Seen { holder: self.holder.clone(), revision: self.revision }
        }
    }

    #[test]
    fn one_leader_per_term_and_in_the_end_one_leader() {
        for seed in 0..SEEDS {
            run(seed);
        }
    }

    fn run(seed: u64) {
        let mut random = Random(seed);
        let mut now = Instant::now();
        let mut store = Store { holder: None, revision: 1, terms: Vec::new(), leaders: BTreeMap::new() };
        let ids = ["a", "b", "c"];
        let mut machines: Vec<_> = ids.iter().map(|id| Machine::new(now, record(id), TTL, false)).collect();
        let mut queue: Vec<(usize, Event)> = Vec::new();
        for round in 0..600 {
            // After some time nothing is lost any more.
            let is_calm = round >= 400;
            now += Duration::from_millis(random.below(400) as u64);
            let who = random.below(machines.len());
            let event = match random.below(12) {
                0..=5 if !queue.is_empty() => {
                    let (who, event) = queue.swap_remove(random.below(queue.len()));
                    perform(&mut machines, &mut store, &mut queue, &mut random, now, who, event, is_calm);
                    continue;
                }
                6 if !is_calm => {
                    // A lease ends.
                    if store.holder.take().is_some() {
                        store.revision += 1;
                    }
                    continue;
                }
                7 if !is_calm => Event::LeaderDied { term: store.holder.as_ref().map_or(0, |h| h.term) },
                8 if !is_calm => Event::Challenged { term: store.revision },
                9 if !is_calm => Event::StepDown,
                10 => store.seen(),
                _ => Event::Tick,
            };
            perform(&mut machines, &mut store, &mut queue, &mut random, now, who, event, is_calm);
        }
        // Everything that is under way arrives, and everybody looks.
        for _ in 0..200 {
            now += TTL / 3;
            let late: Vec<_> = std::mem::take(&mut queue);
            for (who, event) in late.into_iter().chain((0..machines.len()).map(|who| (who, Event::Tick))) {
                perform(&mut machines, &mut store, &mut queue, &mut random, now, who, event, true);
            }
        }
        let leading: Vec<_> = machines.iter().filter_map(Machine::session).collect();
        assert_eq!(leading.len(), 1, "seed {seed}: {leading:?}");
        assert_eq!(store.holder.map(|h| h.term), Some(leading[0].term), "seed {seed}");
        assert!(store.terms.windows(2).all(|w| w[0].0 < w[1].0), "seed {seed}");
    }

    #[allow(clippy::too_many_arguments)]
    fn perform(
        machines: &mut [Machine],
        store: &mut Store,
        queue: &mut Vec<(usize, Event)>,
        random: &mut Random,
        now: Instant,
        who: usize,
        event: Event,
        is_calm: bool,
    ) {
        let before = machines[who].session();
        let actions = machines[who].step(now, event);
        for action in actions {
            let is_lost = !is_calm && random.below(6) == 0;
            let me = machines[who].me.clone();
            let answer = match action {
                Action::Attempt(expected) => {
                    // Lost on its way there, or on its way back.
                    let answer =
                        if is_lost && random.below(2) == 0 { None } else { Some(store.attempt(&me, expected)) };
                    answer.filter(|_| !is_lost).unwrap_or_else(|| Event::AttemptFailed("lost".to_owned()))
                }
                Action::Look if is_lost => Event::LookFailed("lost".to_owned()),
                Action::Look => store.seen(),
                Action::Renew { term } if is_lost => Event::RenewalFailed { term, reason: "lost".to_owned() },
                Action::Renew { term } => match &store.holder {
                    Some(h) if h.term == term => Event::Renewed { term },
                    _ => Event::LeaseEnded { term },
                },
                Action::Release { term } => {
                    if store.holder.as_ref().is_some_and(|h| h.term == term) {
                        store.holder = None;
                        store.revision += 1;
                    }
                    continue;
                }
                Action::Adopt(leader) => Event::Won { term: leader.term },
                Action::Publish | Action::Warn(_) | Action::Info(_) => continue,
            };
            queue.push((who, answer));
        }
        // Who leads was given its term by the store, and a session's term only grows.
        if let Some(session) = machines[who].session() {
            let own = (session.term, machines[who].me.coordinator_id.clone());
            assert!(store.terms.contains(&own), "{own:?} leads, the store gave {:?}", store.terms);
            assert_eq!(*store.leaders.entry(session.term).or_insert(who), who, "one leader in term {}", session.term);
            if let Some(before) = before.filter(|b| b.number == session.number) {
                assert!(session.term >= before.term);
            }
        }
    }
}
