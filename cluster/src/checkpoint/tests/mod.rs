//! Good and hostile files of every format.

mod gguf;
mod memory;
mod safetensors;

use std::path::Path;

use super::{CheckpointError, FORMATS, open};
use crate::partition::PartitionPlan;

/// Opens a checkpoint and uses all that it offers: an `Ok` must be consistent.
fn exercise(path: &Path) -> Result<(), CheckpointError> {
    let checkpoint = open(path)?;
    let config = checkpoint.config();
    let (frequencies, magnitude) = config.rope.frequencies();
    assert_eq!(frequencies.len(), config.rope.dims / 2);
    assert!(magnitude.is_finite());
    PartitionPlan::new(config, &[1.0]).expect("one rank is always possible");
    for tensor in checkpoint.tensors() {
        let rows = checkpoint.rows(&tensor.name, 0..tensor.rows)?;
        assert_eq!(rows.len(), tensor.rows * tensor.row_bytes());
        assert!(checkpoint.rows(&tensor.name, 0..tensor.rows + 1).is_err());
        assert_eq!(checkpoint.find(&tensor.name), Some(tensor));
        // Every byte is really there.
        std::hint::black_box(rows.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
    }
    assert!(checkpoint.rows("no such tensor", 0..1).is_err());
    assert_eq!(checkpoint.identity().len(), 64);
    checkpoint.tokenizer()?;
    Ok(())
}

#[test]
fn formats_have_different_names() {
    for (i, format) in FORMATS.iter().enumerate() {
        assert!(FORMATS[..i].iter().all(|other| other.name() != format.name()));
    }
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = |path: &Path| exercise(path).expect_err("no checkpoint").to_string();
    assert!(text(&folder.path().join("absent.gguf")).contains("absent.gguf: No such file"));
    assert!(text(folder.path()).contains("give one of: a .gguf file, a folder with"));
    let file = folder.path().join("text.gguf");
    for content in ["", "GG", "hello, world"] {
        std::fs::write(&file, content).expect("writable");
        assert!(text(&file).contains("not a checkpoint of a known format"), "{content}");
    }
}
