//! What happened in all lives of a cluster: schedules prove little if it is too little.

/// What happened in all lives.
#[derive(Debug, Default)]
pub struct Totals {
    pub n_answered: usize,
    pub n_cancelled: usize,
    pub n_poisoned: usize,
    pub n_lost_groups: usize,
    pub n_kept: usize,
    /// Formations of a new leader with what an earlier one had computed.
    pub n_inherited: usize,
    pub n_mirrored: usize,
    /// Copies that a new leader's ranks took over.
    pub n_sealed_copies: usize,
    pub n_fetched: usize,
    pub n_switched: usize,
    pub n_smaller: usize,
    pub n_evicted: usize,
    pub n_refused_epochs: usize,
    pub n_cut: usize,
    pub n_paused: usize,
    pub n_leaders: usize,
    pub n_resumed: usize,
}

impl Totals {
    /// Adds another life's.
    pub fn add(&mut self, other: &Self) {
        self.n_answered += other.n_answered;
        self.n_cancelled += other.n_cancelled;
        self.n_poisoned += other.n_poisoned;
        self.n_lost_groups += other.n_lost_groups;
        self.n_kept += other.n_kept;
        self.n_inherited += other.n_inherited;
        self.n_mirrored += other.n_mirrored;
        self.n_sealed_copies += other.n_sealed_copies;
        self.n_fetched += other.n_fetched;
        self.n_switched += other.n_switched;
        self.n_smaller += other.n_smaller;
        self.n_evicted += other.n_evicted;
        self.n_refused_epochs += other.n_refused_epochs;
        self.n_cut += other.n_cut;
        self.n_paused += other.n_paused;
        self.n_leaders += other.n_leaders;
        self.n_resumed += other.n_resumed;
    }
}
