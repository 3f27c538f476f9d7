//! The pages of the KV cache. Their layout: `generic/attention.rs`.

use super::{
    generic::attention::MAX_HEAD_DIM,
    pages::prefer_large,
    prefault::{STRETCH, touch},
};
use crate::{
    error::KernelError,
    layout::TILE,
    ops::{KvShape, Precision, RowChunk},
    slots::{KvRange, SlotSet},
    tensor::Aligned,
};

/// The paged KV cache of all layers.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub shape: KvShape,
    pub precision: Precision,
    /// Slots that steps or copies have written since the pages were made.
    pub written: SlotSet,
    /// Blocks from this one on have never been written.
    end: usize,
    /// A layer each.
    layers: Vec<Aligned<u8>>,
    touched: TouchedPages,
}

/// How far pages are touched that nobody has written.
#[derive(Debug, Clone, Copy, Default)]
struct TouchedPages {
    /// Of each layer, and a stretch more of those before `layer`.
    bytes: usize,
    /// Whose turn it is.
    layer: usize,
}

/// Bytes of a number in the cache.
pub(crate) fn element_bytes(precision: Precision) -> usize {
    match precision {
        Precision::Auto => 2,
        Precision::Float32 => 4,
    }
}

/// Bytes of the keys of one head in a page.
fn key_bytes(shape: KvShape, precision: Precision) -> usize {
    shape.block_size.saturating_mul(shape.head_dim).saturating_mul(element_bytes(precision))
}

/// Bytes of keys and values of one head in a page.
fn head_bytes(shape: KvShape, precision: Precision) -> usize {
    let elements = shape.head_dim.saturating_add(shape.head_dim.saturating_add(TILE - 1) / TILE * TILE);
    shape.block_size.saturating_mul(elements).saturating_mul(element_bytes(precision))
}

/// Bytes of a page: a block in one layer.
pub(crate) fn page_bytes(shape: KvShape, precision: Precision) -> usize {
    head_bytes(shape, precision).saturating_mul(shape.n_kv_heads)
}

impl KvCache {
    /// Zeroed pages. The block size is a multiple of 16.
    pub fn new(shape: KvShape, precision: Precision) -> Result<Self, KernelError> {
        if shape.block_size == 0 || !shape.block_size.is_multiple_of(TILE) {
            return Err(KernelError::Shape {
                op: "alloc_kv",
                want: format!("a block size that is a multiple of {TILE}"),
                got: shape.block_size.to_string(),
            });
        }
        let heads_fit = shape.n_kv_heads > 0 && (1..=MAX_HEAD_DIM).contains(&shape.head_dim);
        if !heads_fit || u32::try_from(shape.n_blocks).is_err() {
            return Err(KernelError::Shape {
                op: "alloc_kv",
                want: format!("at least one KV head, of 1 to {MAX_HEAD_DIM} elements, and fewer than 2^32 blocks"),
                got: format!("{shape:?}"),
            });
        }
        let bytes = page_bytes(shape, precision).saturating_mul(shape.n_blocks);
        let layer = |_| {
            let mut pages = Aligned::zeroed("KV cache", bytes)?;
            // Also because a process that dies gives its memory back before its connections break: gigabytes of small
            // pages would hide its death from the others for a tenth of a second.
            prefer_large(pages.as_mut_slice());
            Ok(pages)
        };
        let layers = (0..shape.n_layers).map(layer).collect::<Result<_, KernelError>>()?;
        let written = SlotSet::new(shape.n_blocks, shape.block_size);
        Ok(Self { shape, precision, written, end: 0, layers, touched: TouchedPages::default() })
    }

    /// These pages as new ones of that shape, if they are as good: never written, and enough.
    pub fn into_new(self, shape: KvShape, precision: Precision) -> Option<Self> {
        let is_alike = self.precision == precision && KvShape { n_blocks: shape.n_blocks, ..self.shape } == shape;
        let is_enough = self.end == 0 && (1..=self.shape.n_blocks).contains(&shape.n_blocks);
        let written = SlotSet::new(shape.n_blocks, shape.block_size);
        (is_alike && is_enough).then_some(Self { shape, written, ..self })
    }

    /// Touches a stretch of one layer's pages beyond those that are written; `false` if enough of them are touched: half a
    /// stretch ahead in every layer, or a whole one where nothing else is to be done.
    pub fn prefault(&mut self, is_idle: bool) -> bool {
        let lead = if is_idle { STRETCH } else { STRETCH / 2 };
        let (written, all) = (self.end * self.page_bytes(), self.shape.n_blocks * self.page_bytes());
        let TouchedPages { mut bytes, layer } = self.touched;
        if layer == 0 {
            // Whoever wrote these touched them.
            bytes = bytes.max(written / STRETCH * STRETCH);
        }
        let end = all.min(bytes + STRETCH);
        if bytes >= (written + lead).next_multiple_of(STRETCH).min(all) {
            return false;
        }
        let Some(pages) = self.layers.get_mut(layer) else { return false };
        touch(&mut pages.as_mut_slice()[bytes..end]);
        let is_last = layer + 1 == self.layers.len();
        self.touched =
            if is_last { TouchedPages { bytes: end, layer: 0 } } else { TouchedPages { bytes, layer: layer + 1 } };
        true
    }

    /// Bytes taken.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(Aligned::bytes).sum()
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> usize {
        page_bytes(self.shape, self.precision)
    }

    /// Offsets in a page of a head's keys and values.
    pub fn head_offsets(&self, head: usize) -> (usize, usize) {
        let keys = head * head_bytes(self.shape, self.precision);
        (keys, keys + key_bytes(self.shape, self.precision))
    }

    /// A layer's pages.
    pub fn layer(&self, layer: usize) -> Option<&[u8]> {
        self.layers.get(layer).map(Aligned::as_slice)
    }

    /// A layer's pages.
    pub fn layer_mut(&mut self, layer: usize) -> Option<&mut [u8]> {
        self.layers.get_mut(layer).map(Aligned::as_mut_slice)
    }

    /// Checks that the chunk's positions have pages in this cache.
    pub fn check_chunk(&self, chunk: &RowChunk) -> Result<(), KernelError> {
        let shape = |want: String, got: String| KernelError::Shape { op: "begin_step", want, got };
        let need = chunk
            .start
            .checked_add(chunk.n_rows)
            .ok_or_else(|| shape("a position that can be counted".into(), chunk.start.to_string()))?
            .div_ceil(self.shape.block_size);
        if chunk.blocks.len() < need {
            return Err(shape(
                format!("{need} blocks of {} for {} positions", self.shape.block_size, chunk.start + chunk.n_rows),
                format!("{} blocks", chunk.blocks.len()),
            ));
        }
        match chunk.blocks.iter().find(|&&block| block as usize >= self.shape.n_blocks) {
            None => Ok(()),
            Some(block) => Err(shape(format!("blocks below {}", self.shape.n_blocks), block.to_string())),
        }
    }

    /// Notes that the chunk's rows are written.
    pub fn note_written(&mut self, chunk: &RowChunk) {
        let positions = chunk.start..chunk.start + chunk.n_rows;
        KvRange::of_positions(&chunk.blocks, positions, self.shape.block_size).for_each(|range| self.note(range));
    }

    /// Notes that slots are written.
    pub fn note(&mut self, range: KvRange) {
        self.end = self.end.max(range.block as usize + 1);
        self.written.insert(range);
    }

    /// Checks that no slot is written by two rows. `spans` is room to work in.
    pub fn check_slots(&self, chunks: &[RowChunk], spans: &mut Vec<(u32, usize, usize)>) -> Result<(), KernelError> {
        let size = self.shape.block_size;
        spans.clear();
        for chunk in chunks.iter().filter(|chunk| chunk.n_rows > 0) {
            let end = chunk.start + chunk.n_rows;
            for index in chunk.start / size..end.div_ceil(size) {
                let first = chunk.start.max(index * size) - index * size;
                spans.push((chunk.blocks[index], first, end.min((index + 1) * size) - index * size));
            }
        }
        spans.sort_unstable();
        match spans.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1) {
            None => Ok(()),
            Some(pair) => Err(KernelError::Shape {
                op: "begin_step",
                want: "a slot of its own for each row".into(),
                got: format!("two rows in block {} slot {}", pair[1].0, pair[1].1),
            }),
        }
    }
}
