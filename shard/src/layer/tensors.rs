//! The loaded tensors of one layer, by name.

use phalanx_kernels::ops::{Buf, Linear};

use crate::model::{LayerPlace, LoadError};

/// A tensor on the device.
#[derive(Debug, Clone, Copy)]
pub enum Loaded {
    /// A vector.
    Vector(Buf),
    /// This rank's part of a matrix; `None` if the rank has none of it.
    Matrix(Option<Linear>),
}

/// What a family builds a layer of.
pub struct LayerTensors {
    /// Which layer.
    pub place: LayerPlace,
    /// For error messages.
    pub architecture: &'static str,
    /// In the order in which the family lists them.
    pub tensors: Vec<(&'static str, Loaded)>,
}

impl LayerTensors {
    /// A vector, such as a norm's weight.
    ///
    /// # Errors
    /// If the family lists no vector of that name.
    pub fn vector(&self, name: &'static str) -> Result<Buf, LoadError> {
        match self.find(name) {
            Some(Loaded::Vector(buf)) => Ok(buf),
            _ => Err(self.unlisted(name, "vector")),
        }
    }

    /// This rank's part of a matrix, or `None` if it has none.
    ///
    /// # Errors
    /// If the family lists no matrix of that name.
    pub fn matrix(&self, name: &'static str) -> Result<Option<Linear>, LoadError> {
        match self.find(name) {
            Some(Loaded::Matrix(linear)) => Ok(linear),
            _ => Err(self.unlisted(name, "matrix")),
        }
    }

    fn find(&self, name: &str) -> Option<Loaded> {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, loaded)| *loaded)
    }

    fn unlisted(&self, tensor: &'static str, kind: &'static str) -> LoadError {
        LoadError::Unlisted { architecture: self.architecture, tensor, kind }
    }
}
