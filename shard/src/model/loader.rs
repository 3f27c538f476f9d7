//! Loads one rank's slice of a checkpoint onto a device.

use std::{collections::BTreeSet, ops::ControlFlow, ops::Range};

use phalanx_cluster::{
    checkpoint::{Checkpoint, TensorInfo},
    partition::PartitionPlan,
};
use phalanx_kernels::{
    error::KernelError,
    ops::{Buf, Linear, Ops},
};

use super::{
    ARCHITECTURES, Architecture, Bias, DecoderLayer, LayerPlace, LoadError, Part, RankShape, TensorSpec, find,
};
use crate::{
    failpoint,
    layer::{
        norm::RmsNorm,
        rope,
        tensors::{LayerTensors, Loaded},
    },
    weights::{self, OwnedWeight, Workshop},
};

/// Bytes of the checkpoint that were read for this rank, of all that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Read and packed so far.
    pub done_bytes: u64,
    /// In the end.
    pub total_bytes: u64,
}

/// One rank's slice of a model, on the device.
pub struct LoadedModel {
    /// Sizes.
    pub shape: RankShape,
    /// In order.
    pub layers: Vec<Box<dyn DecoderLayer>>,
    /// The rank's rows of the embedding table; `None` if it has none.
    pub embedding: Option<Linear>,
    /// The rank's rows of the output matrix; `None` if it has none.
    pub output: Option<Linear>,
    /// Before the output matrix.
    pub output_norm: RmsNorm,
}

const EMBEDDING: TensorSpec = TensorSpec::matrix("token_embd", Part::VocabRows, Bias::None);
const OUTPUT: TensorSpec = TensorSpec::matrix("output", Part::VocabRows, Bias::None);
const OUTPUT_NORM: TensorSpec = TensorSpec::norm("output_norm");

/// Loads the slice that `plan` gives to `rank`. `progress` is called after each tensor and may stop the loading.
///
/// # Errors
/// If a tensor is missing, has another shape or can't be read (naming file and tensor), if the family is unknown, if the
/// device has no memory, or if `progress` says so.
pub fn load(
    checkpoint: &dyn Checkpoint,
    plan: &PartitionPlan,
    rank: usize,
    ops: &mut dyn Ops,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<LoadedModel, LoadError> {
    let config = checkpoint.config();
    let architecture = architecture_of(checkpoint)?;
    let shape = RankShape::new(config, plan, rank);
    let total_bytes = survey(checkpoint, architecture, &shape)?.stored_bytes;
    let rope = ops.load_rope(&rope::spec(&config.rope)).map_err(|source| device("rotary embedding", source))?;
    let workshop = Workshop::new(ops.host_threads());
    let state = Progress { done_bytes: 0, total_bytes };
    let mut loader = Loader { checkpoint, shape: &shape, ops, progress, state, workshop };
    let embedding = loader.matrix(&EMBEDDING, "token_embd")?;
    let output = if config.tied_embeddings { embedding } else { loader.matrix(&OUTPUT, "output")? };
    let output_norm = RmsNorm { weight: loader.vector("output_norm.weight", 0..config.hidden)?, eps: config.norm_eps };
    let layers = (0..config.n_layers)
        .map(|idx| loader.layer(architecture, LayerPlace { idx, rope }))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(LoadedModel { layers, embedding, output, output_norm, shape })
}

/// How much a rank's slice is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SliceSize {
    /// In the checkpoint.
    pub stored_bytes: u64,
    /// Numbers.
    pub elements: u64,
}

/// How much the slice is that `plan` gives to `rank`; reads no tensor.
///
/// # Errors
/// If a tensor is missing or has another shape, or if the family is unknown.
pub fn size(checkpoint: &dyn Checkpoint, plan: &PartitionPlan, rank: usize) -> Result<SliceSize, LoadError> {
    survey(checkpoint, architecture_of(checkpoint)?, &RankShape::new(checkpoint.config(), plan, rank))
}

fn architecture_of(checkpoint: &dyn Checkpoint) -> Result<&'static dyn Architecture, LoadError> {
    let name = &checkpoint.config().architecture;
    find(name).ok_or_else(|| LoadError::UnknownArchitecture {
        file: checkpoint.path().clone(),
        name: name.clone(),
        supported: ARCHITECTURES.iter().map(|a| a.name()).collect::<Vec<_>>().join(", "),
    })
}

/// Checks that all tensors are there in the right shape, before anything is read.
fn survey(
    checkpoint: &dyn Checkpoint,
    architecture: &dyn Architecture,
    shape: &RankShape,
) -> Result<SliceSize, LoadError> {
    let config = checkpoint.config();
    let mut size = SliceSize::default();
    let mut read = BTreeSet::new();
    let mut visit = |stem: String, spec: &TensorSpec| -> Result<(), LoadError> {
        let (rows, cols) = shape.whole(spec.part);
        let (my_rows, my_cols) = shape.mine(spec.part);
        let weight = format!("{stem}.weight");
        size.stored_bytes += stored_bytes(checkpoint.require(&weight, rows, cols)?, my_rows.len(), my_cols.len());
        size.elements += (my_rows.len() * my_cols.len()) as u64;
        read.insert(weight);
        let bias = format!("{stem}.bias");
        if has_bias(checkpoint, spec, &bias) {
            let info = checkpoint.require(&bias, 1, rows)?;
            size.stored_bytes += if my_cols.start == 0 { stored_bytes(info, 1, my_rows.len()) } else { 0 };
            read.insert(bias);
        }
        Ok(())
    };
    visit(EMBEDDING.name.to_owned(), &EMBEDDING)?;
    visit(OUTPUT_NORM.name.to_owned(), &OUTPUT_NORM)?;
    if !config.tied_embeddings {
        visit(OUTPUT.name.to_owned(), &OUTPUT)?;
    }
    for idx in 0..config.n_layers {
        for spec in architecture.layer_tensors() {
            visit(stem_of(idx, spec), spec)?;
        }
    }
    // A layer's tensor that nobody reads means that the model is not what the family's code computes.
    // (Old Hugging Face checkpoints carry the rotary frequencies, which the configuration says as well.)
    let unread = |t: &&TensorInfo| {
        t.name.starts_with("blk.") && !read.contains(&t.name) && !t.name.ends_with("rotary_emb.inv_freq")
    };
    if let Some(tensor) = checkpoint.tensors().iter().find(unread) {
        return Err(LoadError::UnreadTensor {
            file: checkpoint.path().clone(),
            tensor: tensor.name.clone(),
            architecture: config.architecture.clone(),
        });
    }
    Ok(size)
}

fn stem_of(layer: usize, spec: &TensorSpec) -> String {
    format!("blk.{layer}.{}", spec.name)
}

fn has_bias(checkpoint: &dyn Checkpoint, spec: &TensorSpec, name: &str) -> bool {
    match spec.bias {
        Bias::None => false,
        Bias::IfPresent => checkpoint.find(name).is_some(),
        Bias::Required => true,
    }
}

fn stored_bytes(info: &TensorInfo, rows: usize, cols: usize) -> u64 {
    (rows * cols).div_ceil(info.dtype.block_len()) as u64 * info.dtype.block_bytes() as u64
}

fn device(what: &str, source: KernelError) -> LoadError {
    LoadError::Device { what: what.to_owned(), source }
}

struct Loader<'a> {
    checkpoint: &'a dyn Checkpoint,
    shape: &'a RankShape,
    ops: &'a mut dyn Ops,
    progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    state: Progress,
    workshop: Workshop,
}

impl Loader<'_> {
    fn layer(
        &mut self,
        architecture: &'static dyn Architecture,
        place: LayerPlace,
    ) -> Result<Box<dyn DecoderLayer>, LoadError> {
        let mut tensors = Vec::with_capacity(architecture.layer_tensors().len());
        for spec in architecture.layer_tensors() {
            let stem = stem_of(place.idx, spec);
            let loaded = match spec.part {
                Part::Hidden => Loaded::Vector(self.vector(&format!("{stem}.weight"), 0..self.shape.config.hidden)?),
                _ => Loaded::Matrix(self.matrix(spec, &stem)?),
            };
            tensors.push((spec.name, loaded));
        }
        architecture.layer(&LayerTensors { place, architecture: architecture.name(), tensors }, self.shape)
    }

    fn vector(&mut self, name: &str, range: Range<usize>) -> Result<Buf, LoadError> {
        let values = self.values(name, range)?;
        let buf = self.ops.load_vector(&values).map_err(|source| device(name, source))?;
        self.report()?;
        Ok(buf)
    }

    fn matrix(&mut self, spec: &TensorSpec, stem: &str) -> Result<Option<Linear>, LoadError> {
        let (rows, cols) = self.shape.mine(spec.part);
        if rows.is_empty() || cols.is_empty() {
            return Ok(None);
        }
        let bias_name = format!("{stem}.bias");
        // Where inputs are dealt to ranks, the rank that has the first input adds the bias.
        let bias = if cols.start == 0 && has_bias(self.checkpoint, spec, &bias_name) {
            Some(self.values(&bias_name, rows.clone())?)
        } else {
            None
        };
        let name = format!("{stem}.weight");
        if let Some(info) = self.checkpoint.find(&name) {
            self.state.done_bytes += stored_bytes(info, rows.len(), cols.len());
        }
        let weight = OwnedWeight::load(self.checkpoint, &name, rows, cols, &mut self.workshop)?;
        let source =
            weight.as_source(bias.as_deref(), self.shape.slice_width(spec.part), self.shape.activations(spec.part));
        let linear = self.ops.load_linear(source).map_err(|source| device(&name, source))?;
        self.workshop.take_back(weight);
        self.report()?;
        Ok(Some(linear))
    }

    fn values(&mut self, name: &str, range: Range<usize>) -> Result<Vec<f32>, LoadError> {
        if let Some(info) = self.checkpoint.find(name) {
            self.state.done_bytes += stored_bytes(info, 1, range.len());
        }
        Ok(weights::load_vector(self.checkpoint, name, range)?)
    }

    fn report(&mut self) -> Result<(), LoadError> {
        failpoint::loading(self.state.done_bytes, self.state.total_bytes);
        match (self.progress)(self.state) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(LoadError::Interrupted),
        }
    }
}
