//! Owns requests: frontends, scheduler, groups, journal, policy. No tensor math.
