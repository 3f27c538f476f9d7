//! [`Ops`] of the CPU: checks shapes, deals the work to threads, calls the kernels.
#![allow(unsafe_code)]

use super::{
    CpuOps, RowMath, Shared,
    buffers::{check_distinct, product},
    generic::{
        attention::{AttentionTask, NextPages},
        linear::Out,
    },
    input::InputRows,
    kv::{self, KvCache},
    linear::rows_per_task,
    pool::Pool,
    shape_error,
    simd::LANES,
    steps::RopeTable,
};
use crate::{
    collective::Collective,
    error::KernelError,
    layout::Packed,
    ops::{Attention, Buf, FixedBuf, Input, KvShape, Linear, LinearSource, Ops, Precision, Rope, RopeSpec, StepRows},
    pages::KvPages,
    slots::{KvRange, SlotSet},
    tensor::Aligned,
};

/// Number of these numerics: changes whenever a result, or a choice among results, changes in a bit.
const NUMERICS: u32 = 3;

impl CpuOps {
    fn weight(&self, op: &'static str, linear: Linear) -> Result<&Packed, KernelError> {
        self.weights
            .get(linear.id as usize)
            .filter(|weight| (weight.n_out, weight.n_in) == (linear.n_out, linear.n_in))
            .ok_or_else(|| shape_error(op, "weights of this device", format!("{linear:?}")))
    }
}

/// A buffer that is rotated.
#[derive(Clone, Copy)]
struct Rotated {
    x: *mut f32,
    n_heads: usize,
}

/// Runs `task(from, len)` over stretches of `len` elements.
fn elementwise(pool: &mut Pool, len: usize, task: &(dyn Fn(usize, usize) + Sync)) {
    let per_task = rows_per_task(len, 1, pool.n_threads()).next_multiple_of(LANES);
    pool.run(len.div_ceil(per_task), &|index, _| {
        let from = index * per_task;
        task(from, per_task.min(len - from));
    });
}

impl Ops for CpuOps {
    fn name(&self) -> String {
        let n = self.pool.n_threads();
        format!("cpu ({}, {n} thread{})", self.isa.name(), if n == 1 { "" } else { "s" })
    }

    fn fingerprint(&self) -> String {
        let precision = match self.precision {
            Precision::Auto => "auto",
            Precision::Float32 => "float32",
        };
        format!("cpu numerics {NUMERICS}, {precision}")
    }

    fn resident_bytes(&self) -> u64 {
        let scratch = self.quantized.bytes() + self.interleaved.bytes() + self.computed.bytes() + self.scores.bytes();
        self.weights.iter().map(Packed::bytes).sum::<u64>()
            + self.buffers.bytes()
            + self.kv.as_ref().map_or(0, KvCache::bytes)
            + scratch
    }

    fn host_threads(&self) -> usize {
        self.pool.n_threads()
    }

    fn row_math(&self) -> RowMath {
        RowMath::new(self.isa)
    }

    fn alloc(&mut self, len: usize) -> Result<Buf, KernelError> {
        Ok(self.buffers.add(Aligned::zeroed("activations", len)?))
    }

    fn alloc_fixed(&mut self, len: usize) -> Result<FixedBuf, KernelError> {
        Ok(self.buffers.add_fixed(Aligned::zeroed("fixed-point sums", len)?))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Buf, KernelError> {
        Ok(self.buffers.add(Aligned::from_slice("weights", values)?))
    }

    fn load_linear(&mut self, source: LinearSource<'_>) -> Result<Linear, KernelError> {
        let packed = Packed::new(&source, self.precision, self.host_threads(), &mut self.arena)?;
        self.weights.push(packed);
        Ok(Linear { id: (self.weights.len() - 1) as u32, n_out: source.n_out, n_in: source.n_in })
    }

    fn load_rope(&mut self, spec: &RopeSpec) -> Result<Rope, KernelError> {
        if spec.inv_freq.is_empty() {
            return Err(shape_error("load_rope", "at least one frequency", "none"));
        }
        self.ropes.push(RopeTable::new(spec.clone()));
        Ok(Rope((self.ropes.len() - 1) as u32))
    }

    fn kv_bytes_per_block(&self, shape: KvShape) -> u64 {
        (kv::page_bytes(shape, self.precision) as u64).saturating_mul(shape.n_layers as u64)
    }

    fn alloc_kv(&mut self, shape: KvShape) -> Result<(), KernelError> {
        self.step.clear();
        let earlier = self.kv.take().and_then(|kv| kv.into_new(shape, self.precision));
        self.kv = Some(match earlier {
            Some(pages) => pages,
            None => KvCache::new(shape, self.precision)?,
        });
        Ok(())
    }

    fn adopt_kv(&mut self, pages: KvPages) -> Result<(), KernelError> {
        if pages.cache.precision != self.precision {
            return Err(shape_error(
                "adopt_kv",
                format!("pages in {:?}", self.precision),
                format!("{:?}", pages.cache.precision),
            ));
        }
        self.step.clear();
        self.kv = Some(pages.into_cache());
        Ok(())
    }

    fn prefault(&mut self, is_idle: bool) -> bool {
        (is_idle && self.buffers.prefault()) || self.kv.as_mut().is_some_and(|kv| kv.prefault(is_idle))
    }

    fn kv_shape(&self) -> Option<KvShape> {
        self.kv.as_ref().map(|kv| kv.shape)
    }

    fn written_kv(&self) -> Option<&SlotSet> {
        self.kv.as_ref().map(|kv| &kv.written)
    }

    fn read_kv(&mut self, ranges: &[KvRange], rows: &mut Vec<u8>) -> Result<(), KernelError> {
        match &self.kv {
            Some(kv) => kv.read_rows(ranges, rows, &mut self.pool),
            None => Err(shape_error("read_kv", "a KV cache: call alloc_kv first", "none")),
        }
    }

    fn begin_step(&mut self, rows: &StepRows) -> Result<(), KernelError> {
        self.step.clear();
        if let Some(kv) = &mut self.kv {
            rows.chunks.iter().try_for_each(|chunk| kv.check_chunk(chunk))?;
            kv.check_slots(&rows.chunks, &mut self.step.spans)?;
            rows.chunks.iter().for_each(|chunk| kv.note_written(chunk));
        }
        self.step.begin(rows)
    }

    fn embed(&mut self, table: Linear, local_ids: &[u32], out: FixedBuf) -> Result<(), KernelError> {
        let op = "embed";
        self.weight(op, table)?;
        if let Some(id) = local_ids.iter().find(|&&id| id != u32::MAX && id as usize >= table.n_out) {
            return Err(shape_error(op, format!("rows below {}", table.n_out), id.to_string()));
        }
        let len = product(op, &[local_ids.len(), table.n_in])?;
        let out = Shared(self.buffers.fixed_pointer(op, out, len)?);
        let packed = &self.weights[table.id as usize];
        self.pool.run(local_ids.len(), &|row, _| {
            // SAFETY: row `row` of the buffer, which has `len` elements; each task has its own row.
            let out = unsafe { std::slice::from_raw_parts_mut(out.get().add(row * table.n_in), table.n_in) };
            match local_ids[row] {
                u32::MAX => out.fill(0),
                id => packed.unpack_row(id as usize, |k, value| out[k] = i64::from(value.to_bits())),
            }
        });
        Ok(())
    }

    fn bits_to_f32(&mut self, src: FixedBuf, dst: Buf, len: usize) -> Result<(), KernelError> {
        let op = "bits_to_f32";
        let dst = Shared(self.buffers.pointer(op, dst, len)?);
        let src = Shared(self.buffers.fixed_pointer(op, src, len)?);
        elementwise(&mut self.pool, len, &|from, n| {
            for i in from..from + n {
                // SAFETY: both buffers have `len` elements; each task has its own stretch.
                unsafe { *dst.get().add(i) = f32::from_bits(*src.get().add(i) as u32) };
            }
        });
        Ok(())
    }

    fn linear(&mut self, x: Input, n_rows: usize, outputs: &[(Linear, Buf)]) -> Result<(), KernelError> {
        let op = "linear";
        let Some((first, _)) = outputs.first() else { return Ok(()) };
        let x = InputRows::new(op, &mut self.buffers, x, [n_rows, first.n_in], outputs.iter().map(|(_, out)| *out))?;
        let mut n_levels = None;
        for (weight, out) in outputs {
            if weight.n_in != first.n_in {
                return Err(shape_error(op, format!("weights of {} inputs", first.n_in), weight.n_in.to_string()));
            }
            let packed = self.weight(op, *weight)?;
            if packed.kind.is_quantized() && packed.n_levels != *n_levels.get_or_insert(packed.n_levels) {
                return Err(shape_error(op, "weights that meet the same activations", format!("{weight:?} does not")));
            }
            if self.weight(op, *weight)?.slice_width.is_some() {
                return Err(shape_error(op, "weights without slices", format!("{weight:?}, made for linear_exact")));
            }
            self.buffers.floats(op, *out, product(op, &[n_rows, weight.n_out])?)?;
        }
        // The pointers are collected first: later checks of the same buffers would end them.
        let mut pointers = [std::ptr::null_mut(); 16];
        if outputs.len() > pointers.len() {
            return Err(shape_error(op, format!("at most {} outputs", pointers.len()), outputs.len().to_string()));
        }
        for (pointer, (weight, out)) in pointers.iter_mut().zip(outputs) {
            *pointer = self.buffers.pointer(op, *out, n_rows * weight.n_out)?;
        }
        let outputs = outputs.iter().zip(pointers).map(|((w, _), p)| (w.id as usize, Out::Floats(p)));
        // SAFETY: lengths are checked, buffers are distinct.
        unsafe { self.products(x, n_rows, outputs) }
    }

    fn linear_exact(&mut self, x: Input, n_rows: usize, weight: Linear, out: FixedBuf) -> Result<(), KernelError> {
        let op = "linear_exact";
        if self.weight(op, weight)?.slice_width.is_none() {
            return Err(shape_error(op, "weights with a slice width", format!("{weight:?}, made for linear")));
        }
        let x = InputRows::new(op, &mut self.buffers, x, [n_rows, weight.n_in], std::iter::empty())?;
        let out = self.buffers.fixed_pointer(op, out, product(op, &[n_rows, weight.n_out])?)?;
        // SAFETY: lengths are checked.
        unsafe { self.products(x, n_rows, std::iter::once((weight.id as usize, Out::Fixed(out)))) }
    }

    fn all_reduce(&mut self, buf: FixedBuf, len: usize, collective: &mut dyn Collective) -> Result<(), KernelError> {
        Ok(collective.all_reduce(self.buffers.fixed("all_reduce", buf, len)?)?)
    }

    fn add_reduced(
        &mut self,
        x: Buf,
        delta: FixedBuf,
        len: usize,
        collective: &mut dyn Collective,
    ) -> Result<(), KernelError> {
        let (x, delta) = self.buffers.floats_and_fixed("add_reduced", (x, delta), len)?;
        let (pool, add_fixed) = (&mut self.pool, self.table.add_fixed);
        let mut add = |sums: &[i64], x: &mut [f32]| {
            let len = sums.len().min(x.len());
            let (sums, x) = (Shared(sums.as_ptr()), Shared(x.as_mut_ptr()));
            elementwise(pool, len, &|from, n| {
                // SAFETY: both have `len` elements; each task has its own stretch; the CPU has the table.
                unsafe { add_fixed(x.get().add(from), sums.get().add(from), n) };
            });
        };
        Ok(collective.all_reduce_into(delta, x, &mut add)?)
    }

    fn rope(&mut self, xs: &[(Buf, usize)], head_dim: usize, rope: Rope) -> Result<(), KernelError> {
        let op = "rope";
        let rope = self.ropes.get_mut(rope.0 as usize);
        let rope = rope.ok_or_else(|| shape_error(op, "a rotary embedding of this device", "another"))?;
        if head_dim == 0 || 2 * rope.spec.inv_freq.len() > head_dim {
            let want = format!("heads of at least {} elements", 2 * rope.spec.inv_freq.len());
            return Err(shape_error(op, want, head_dim.to_string()));
        }
        let mut rotated = [Rotated { x: std::ptr::null_mut(), n_heads: 0 }; 4];
        if xs.len() > rotated.len() {
            return Err(shape_error(op, format!("at most {} buffers", rotated.len()), xs.len().to_string()));
        }
        check_distinct(op, &[], xs.iter().map(|(x, _)| *x))?;
        let (mut width, n_rows) = (0, self.step.n_rows);
        for (to, &(x, n_heads)) in rotated.iter_mut().zip(xs) {
            let len = product(op, &[n_rows, n_heads, head_dim])?;
            *to = Rotated { x: self.buffers.pointer(op, x, len)?, n_heads };
            width += n_heads * head_dim;
        }
        rope.prepare(&self.step);
        let (rope, xs) = (&*rope, Shared(&rotated[..xs.len()]));
        let (kernel, per_task) = (self.table.rope, rows_per_task(n_rows, width, self.pool.n_threads()));
        self.pool.run(n_rows.div_ceil(per_task), &|index, _| {
            for row in index * per_task..n_rows.min((index + 1) * per_task) {
                let (cos, sin) = rope.row(row);
                for &Rotated { x, n_heads } in xs.get() {
                    // SAFETY: a row of a checked buffer; each task has its own rows; the CPU has the table.
                    unsafe { kernel(x.add(row * n_heads * head_dim), n_heads, head_dim, rope.spec.style, cos, sin) };
                }
            }
        });
        Ok(())
    }

    fn store_kv(&mut self, layer: usize, k: Buf, v: Buf) -> Result<(), KernelError> {
        let op = "store_kv";
        let cache = self.kv.as_mut().ok_or_else(|| shape_error(op, "a KV cache: call alloc_kv first", "none"))?;
        let shape = cache.shape;
        let store = match self.precision {
            Precision::Auto => self.table.store_f16,
            Precision::Float32 => self.table.store_f32,
        };
        let (width, page_bytes) = (shape.n_kv_heads * shape.head_dim, cache.page_bytes());
        let n_rows = self.step.n_rows;
        let pages = cache
            .layer_mut(layer)
            .ok_or_else(|| shape_error(op, format!("a layer below {}", shape.n_layers), layer.to_string()))?;
        let pages = Shared(pages.as_mut_ptr());
        let len = product(op, &[n_rows, width])?;
        let k = Shared(self.buffers.pointer(op, k, len)?.cast_const());
        let v = Shared(self.buffers.pointer(op, v, len)?.cast_const());
        let (chunks, cache) = (self.step.chunks(), &*cache);
        // A task is 16 rows of a chunk, so that threads seldom write to the same cache line.
        let tasks_of = |n_rows: usize| n_rows.div_ceil(16);
        let n_tasks = chunks.iter().map(|chunk| tasks_of(chunk.n_rows)).sum();
        self.pool.run(n_tasks, &|mut index, _| {
            for chunk in chunks {
                if index >= tasks_of(chunk.n_rows) {
                    index -= tasks_of(chunk.n_rows);
                    continue;
                }
                for i in index * 16..chunk.n_rows.min((index + 1) * 16) {
                    let (position, from) = (chunk.start + i, (chunk.first_row + i) * width);
                    let page = chunk.blocks[position / shape.block_size] as usize * page_bytes;
                    for head in 0..shape.n_kv_heads {
                        let (keys, values) = cache.head_offsets(head);
                        let at = from + head * shape.head_dim;
                        // SAFETY: `begin_step` checked that the blocks exist and that each slot is one row's; buffers
                        // have `n_rows * width` elements; the CPU has the table.
                        unsafe {
                            let page = pages.get().add(page);
                            let (k, v) = (k.get().add(at), v.get().add(at));
                            let slot = position % shape.block_size;
                            store(shape.head_dim, slot, page.add(keys), page.add(values), k, v);
                        }
                    }
                }
                return;
            }
        });
        Ok(())
    }

    fn attention(&mut self, attention: Attention<'_>, q: Buf, out: Buf) -> Result<(), KernelError> {
        let op = "attention";
        check_distinct(op, &[q], [out].into_iter())?;
        let cache = self.kv.as_ref().ok_or_else(|| shape_error(op, "a KV cache: call alloc_kv first", "none"))?;
        let (shape, page_bytes) = (cache.shape, cache.page_bytes());
        let heads = attention.kv_head_of;
        if heads.len() != attention.n_heads || !heads.is_sorted() {
            let want = format!("{} KV heads in ascending order", attention.n_heads);
            return Err(shape_error(op, want, format!("{heads:?}")));
        }
        if heads.last().is_some_and(|&last| last as usize >= shape.n_kv_heads) {
            return Err(shape_error(op, format!("KV heads below {}", shape.n_kv_heads), format!("{heads:?}")));
        }
        let pages = cache
            .layer(attention.layer)
            .ok_or_else(|| shape_error(op, format!("a layer below {}", shape.n_layers), attention.layer.to_string()))?;
        let len = product(op, &[self.step.n_rows, attention.n_heads, shape.head_dim])?;
        let q = self.buffers.pointer(op, q, len)?.cast_const();
        let out = self.buffers.pointer(op, out, len)?;

        let (n_threads, together) = (self.pool.n_threads(), self.table.queries);
        let n_rows = self.step.n_rows;
        let n_queries = n_rows * attention.n_heads;
        // Whole register blocks, unless there are too few for all threads.
        let per_task = match n_queries / (4 * n_threads) {
            n if n >= together => n.min(8 * together) / together * together,
            _ => together.min(n_queries.div_ceil(n_threads)).max(1),
        };
        let mut tasks = std::mem::take(&mut self.attention_tasks);
        tasks.clear();
        let mut max_len = 0;
        for chunk in self.step.chunks().iter().filter(|chunk| chunk.n_rows > 0) {
            max_len = max_len.max(chunk.start + chunk.n_rows);
            let mut first_head = 0;
            for group in heads.chunk_by(|a, b| a == b) {
                let (keys, values) = cache.head_offsets(group[0] as usize);
                let n_queries = chunk.n_rows * group.len();
                let then = NextPages {
                    base: pages[keys..].as_ptr(),
                    blocks: chunk.blocks.as_ptr(),
                    n_pages: (chunk.start + chunk.n_rows).div_ceil(shape.block_size),
                };
                for first in (0..n_queries).step_by(per_task) {
                    tasks.push(AttentionTask {
                        keys: pages[keys..].as_ptr(),
                        values: pages[values..].as_ptr(),
                        page_bytes,
                        blocks: chunk.blocks.as_ptr(),
                        block_size: shape.block_size,
                        head_dim: shape.head_dim,
                        q,
                        out,
                        n_heads: attention.n_heads,
                        first_row: chunk.first_row,
                        first_head,
                        group: group.len(),
                        start: chunk.start,
                        scale: attention.scale,
                        queries: first..n_queries.min(first + per_task),
                        then,
                    });
                }
                first_head += group.len();
            }
        }
        // A thread's rows are those that it has in other operations.
        let share = |task: &AttentionTask| (task.first_row + task.queries.start / task.group) * n_threads / n_rows;
        tasks.sort_unstable_by_key(|task| (share(task), task.first_row, task.first_head, task.queries.start));
        // The task that the same thread will most likely take next.
        for next in 1..tasks.len() {
            tasks[next - 1].then = tasks[next].then;
        }
        let stretch = (self.table.attention_scratch_len)(max_len).next_multiple_of(16);
        self.scores.reserve("attention scores", stretch * n_threads)?;
        let scratch = Shared(self.scores.as_mut_slice().as_mut_ptr());
        let kernel = match self.precision {
            Precision::Auto => self.table.attention_f16,
            Precision::Float32 => self.table.attention_f32,
        };
        let shared = Shared(tasks.as_slice());
        let first_of = |thread| tasks.partition_point(|task| share(task) < thread);
        self.pool.run_shares(tasks.len(), &first_of, &|index, thread| {
            // SAFETY: `begin_step` checked the blocks, lengths are checked above, each task has its own queries and each
            // thread its own stretch of scratch; the CPU has the table.
            unsafe { kernel(&shared.get()[index], scratch.get().add(thread * stretch)) };
        });
        tasks.clear();
        self.attention_tasks = tasks;
        Ok(())
    }

    fn gather_rows(&mut self, src: Buf, rows: &[u32], width: usize, dst: Buf) -> Result<(), KernelError> {
        let op = "gather_rows";
        check_distinct(op, &[src], [dst].into_iter())?;
        let n = rows.iter().max().map_or(0, |&row| row as usize + 1);
        let src = self.buffers.pointer(op, src, product(op, &[n, width])?)?;
        let dst = self.buffers.floats(op, dst, product(op, &[rows.len(), width])?)?;
        for (i, &row) in rows.iter().enumerate() {
            // SAFETY: `src` has all rows up to the largest; it is another buffer than `dst`.
            let from = unsafe { std::slice::from_raw_parts(src.add(row as usize * width), width) };
            dst[i * width..][..width].copy_from_slice(from);
        }
        Ok(())
    }

    fn argmax(&mut self, x: Buf, n_rows: usize, width: usize, out: &mut [(f32, u32)]) -> Result<(), KernelError> {
        let op = "argmax";
        if out.len() != n_rows || width == 0 || u32::try_from(width).is_err() {
            let want = format!("{n_rows} results of rows of 1 to 2^32 - 1 elements");
            return Err(shape_error(op, want, format!("{} of {width}", out.len())));
        }
        let x = Shared(self.buffers.pointer(op, x, product(op, &[n_rows, width])?)?.cast_const());
        let (argmax, out) = (self.table.argmax, Shared(out.as_mut_ptr()));
        self.pool.run(n_rows, &|row, _| {
            // SAFETY: a row of a checked buffer; each task has its own result; the CPU has the table.
            unsafe { *out.get().add(row) = argmax(x.get().add(row * width), width) };
        });
        Ok(())
    }

    fn read(&mut self, src: Buf, offset: usize, dst: &mut [f32]) -> Result<(), KernelError> {
        let end = offset.saturating_add(dst.len());
        dst.copy_from_slice(&self.buffers.floats("read", src, end)?[offset..]);
        Ok(())
    }

    fn write(&mut self, dst: Buf, offset: usize, src: &[f32]) -> Result<(), KernelError> {
        let end = offset.saturating_add(src.len());
        self.buffers.floats("write", dst, end)?[offset..].copy_from_slice(src);
        Ok(())
    }
}
