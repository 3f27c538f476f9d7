//! Words and numbers for people.

use comfy_table::{CellAlignment, Table, presets};

/// Without control characters: what a member says of itself must not move the reader's cursor.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// A table without lines, so that `grep` and `awk` read it too. Columns named in `numbers` are right-aligned.
pub(super) fn table(header: &[&str], numbers: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    for row in rows {
        // An empty cell would shift the ones behind it for tools that split at spaces.
        table.add_row(row.into_iter().map(|c| if c.is_empty() { "-".to_owned() } else { plain(&c) }));
    }
    for (index, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(index).filter(|_| numbers.contains(name)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// A number of bytes with three digits and a unit.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value {
        _ if unit == 0 => format!("{n} B"),
        value if value < 10.0 => format!("{value:.2} {}", UNITS[unit]),
        value if value < 100.0 => format!("{value:.1} {}", UNITS[unit]),
        value => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// A time in milliseconds.
pub(super) fn milliseconds(ms: u32) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { format!("{} s", ms / 1000) }
}

/// `1 shard`, `2 shards`.
pub(super) fn count(n: u64, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}
