//! The model's file: found or fetched, opened once, checked against the coordinator's.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use phalanx_cluster::{
    checkpoint::{self, Checkpoint},
    source,
};
use phalanx_kernels::collective::AbortFlag;
use phalanx_proto::v1::Form;

use super::rank::EngineError;
use crate::{model::LoadError, step::grammar::Grammars};

/// How often a wait for a file looks whether it is still wanted.
const WAKE_INTERVAL: Duration = Duration::from_millis(10);

/// An open checkpoint. Cloning shares it.
pub(super) type Opened = Arc<dyn Checkpoint>;

/// Remembers the last checkpoint that was opened: opening takes time, and the next form mostly wants the same.
#[derive(Default)]
pub(super) struct Checkpoints {
    last: Option<(String, Opened)>,
    grammars: Option<(String, Arc<Grammars>)>,
}

impl Checkpoints {
    /// The form's checkpoint, if it is open already.
    pub fn get(&self, form: &Form) -> Option<Opened> {
        let (_, opened) = self.last.as_ref().filter(|(model, opened)| {
            // By identity: the file may have been replaced since.
            *model == form.model && opened.identity() == form.model_hash
        })?;
        Some(opened.clone())
    }

    /// Remembers what [`open`] gave for this form.
    pub fn remember(&mut self, form: &Form, opened: Opened) {
        self.last = Some((form.model.clone(), opened));
    }

    /// What follows grammars with this checkpoint's vocabulary.
    pub fn grammars(&mut self, opened: &Opened) -> Arc<Grammars> {
        if let Some((_, grammars)) = self.grammars.as_ref().filter(|(identity, _)| identity == opened.identity()) {
            return Arc::clone(grammars);
        }
        let grammars = Arc::new(Grammars::of_model(Arc::clone(opened)));
        self.grammars = Some((opened.identity().to_owned(), Arc::clone(&grammars)));
        grammars
    }

    /// The form's checkpoint, opened if need be. Ends at once when `abort` is raised.
    ///
    /// # Errors
    /// As [`open`], and [`LoadError::Interrupted`].
    pub fn open(&mut self, form: &Form, abort: &AbortFlag) -> Result<Opened, EngineError> {
        if let Some(opened) = self.get(form) {
            return Ok(opened);
        }
        // In a thread of its own: a model that is fetched takes minutes, in which nothing else could reach this one.
        let (done, opening) = mpsc::channel();
        let wanted = form.clone();
        thread::Builder::new()
            .name("open".to_owned())
            .spawn(move || {
                // Nobody waits for it any more: the file is there for the next form.
                let _unwanted = done.send(open(&wanted));
            })
            .map_err(|error| EngineError::Model { model: form.model.clone(), reason: error.to_string() })?;
        loop {
            match opening.recv_timeout(WAKE_INTERVAL) {
                Ok(opened) => {
                    let opened = opened?;
                    self.remember(form, opened.clone());
                    return Ok(opened);
                }
                Err(mpsc::RecvTimeoutError::Timeout) if abort.is_aborted() => return Err(LoadError::Interrupted.into()),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let reason = "opening it panicked".to_owned();
                    return Err(EngineError::Model { model: form.model.clone(), reason });
                }
            }
        }
    }
}

/// Opens the form's model and checks that it is the coordinator's.
///
/// # Errors
/// If it is not here and can't be fetched, can't be read, or is another one.
pub(super) fn open(form: &Form) -> Result<Opened, EngineError> {
    let path = find(&form.model)?;
    let checkpoint = checkpoint::open(&path)?;
    if checkpoint.identity() == form.model_hash {
        Ok(Arc::from(checkpoint))
    } else {
        Err(EngineError::OtherModel {
            file: path,
            want: form.model_hash.clone(),
            got: checkpoint.identity().to_owned(),
        })
    }
}

/// The model's place on this machine; fetched, if it is not here yet.
fn find(model: &str) -> Result<PathBuf, EngineError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    source::resolve_quietly(model)
        .map_err(|error| EngineError::Model { model: model.to_owned(), reason: error.to_string() })
}
