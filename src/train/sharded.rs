//! ZeRO stage 3's frozen base: each rank holds a piece of every tensor of the layers, and a layer
//! is gathered when it is computed with.
//!
//! A thread of its own gathers, over a group of its own, so that the next layer arrives while the
//! present one is computed with. Every rank must ask for the same layers in the same order.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use candle_core::{Error, Result};

use crate::distributed::Comm;
use crate::kernels::Kernels;
use crate::models::ModelConfig;
use crate::weights::{StoredTensor, TensorInfo, TensorSource, WeightsError};

use super::TrainError;
use super::model::{BaseLoader, FrozenLayer};
use super::zero::piece;

/// One rank's piece of a tensor.
struct Piece {
    info: TensorInfo,
    /// Bytes of the whole tensor.
    len: usize,
    data: Bytes,
}

/// The tensors of one layer, whole again.
struct GatheredLayer(BTreeMap<String, StoredTensor>);

impl TensorSource for GatheredLayer {
    fn tensors(&self) -> std::result::Result<Vec<TensorInfo>, WeightsError> {
        Ok((self.0.values())
            .map(|tensor| TensorInfo {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
            })
            .collect())
    }

    fn tensor(&self, name: &str) -> std::result::Result<StoredTensor, WeightsError> {
        let missing = || WeightsError::MissingTensor {
            path: "the gathered layer".into(),
            tensor: name.to_owned(),
        };
        self.0.get(name).cloned().ok_or_else(missing)
    }
}

/// The layers of a base that ranks share.
pub(super) struct ShardedLayers {
    requests: Sender<usize>,
    replies: Receiver<Result<GatheredLayer>>,
    kernels: Kernels,
    config: ModelConfig,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// The layer that was asked for and has not been taken.
    pending: Option<usize>,
    last: Option<(usize, Arc<FrozenLayer>)>,
}

impl ShardedLayers {
    /// Takes this rank's pieces and starts the thread that gathers.
    ///
    /// # Errors
    /// [`TrainError::Weights`] when a tensor can not be read, [`TrainError::Kernel`] when the
    /// thread can not be started.
    pub(super) fn load(
        source: &dyn TensorSource,
        config: &ModelConfig,
        kernels: &Kernels,
        comm: Comm,
    ) -> std::result::Result<Self, TrainError> {
        let mut layers: Vec<Vec<Piece>> = Vec::new();
        let infos = source.tensors()?;
        for index in 0..config.num_layers {
            let prefix = format!("model.layers.{index}.");
            let infos = infos.iter().filter(|info| info.name.starts_with(&prefix));
            let pieces = infos.map(|info| {
                let data = source.tensor(&info.name)?.data;
                let range = piece(data.len(), comm.rank(), comm.world_size());
                Ok(Piece {
                    info: info.clone(),
                    len: data.len(),
                    data: data.slice(range),
                })
            });
            layers.push(pieces.collect::<std::result::Result<_, WeightsError>>()?);
        }
        let (requests, asked) = channel::<usize>();
        let (reply, replies) = channel();
        std::thread::Builder::new()
            .name(format!("gather-{}", comm.rank()))
            .spawn(move || {
                // Either end is gone when its rank has ended.
                while let Ok(index) = asked.recv() {
                    if reply.send(gather(&comm, &layers[index])).is_err() {
                        break;
                    }
                }
            })
            .map_err(|error| TrainError::kernel("start of the gathering thread")(error.into()))?;
        Ok(Self {
            requests,
            replies,
            kernels: kernels.clone(),
            config: config.clone(),
            state: RefCell::default(),
        })
    }

    /// Returns a layer and has `next` gathered meanwhile.
    ///
    /// # Errors
    /// When another rank has ended.
    pub(super) fn layer(&self, index: usize, next: Option<usize>) -> Result<Arc<FrozenLayer>> {
        let mut state = self.state.borrow_mut();
        let layer = match &state.last {
            Some((last, layer)) if *last == index => Arc::clone(layer),
            _ => self.take(&mut state, index)?,
        };
        state.last = Some((index, Arc::clone(&layer)));
        if let Some(next) = next
            && next != index
            && state.pending.is_none()
        {
            self.ask(&mut state, next)?;
        }
        Ok(layer)
    }

    fn ask(&self, state: &mut State, index: usize) -> Result<()> {
        state.pending = Some(index);
        self.requests.send(index).map_err(|_| ended())
    }

    fn take(&self, state: &mut State, index: usize) -> Result<Arc<FrozenLayer>> {
        // The layer before goes first: two whole layers are held at most, this and the next.
        state.last = None;
        while let Some(pending) = state.pending.take() {
            let gathered = self.replies.recv().map_err(|_| ended())??;
            if pending == index {
                return self.build(&gathered, index);
            }
        }
        self.ask(state, index)?;
        state.pending = None;
        let gathered = self.replies.recv().map_err(|_| ended())??;
        self.build(&gathered, index)
    }

    fn build(&self, gathered: &GatheredLayer, index: usize) -> Result<Arc<FrozenLayer>> {
        let loader = BaseLoader {
            source: gathered,
            kernels: &self.kernels,
            config: &self.config,
        };
        loader.layer(index).map(Arc::new).map_err(Error::wrap)
    }
}

fn ended() -> Error {
    Error::Msg("the thread that gathers layers has ended".to_owned())
}

/// Puts the tensors of a layer together from every rank's pieces.
fn gather(comm: &Comm, pieces: &[Piece]) -> Result<GatheredLayer> {
    let own: Vec<u8> = pieces
        .iter()
        .flat_map(|piece| piece.data.iter().copied())
        .collect();
    let parts = comm.all_gather_bytes(&own)?;
    let mut read = vec![0; parts.len()];
    let mut tensors = BTreeMap::new();
    for part in pieces {
        let mut data = Vec::with_capacity(part.len);
        for (rank, (bytes, read)) in parts.iter().zip(&mut read).enumerate() {
            let len = piece(part.len, rank, parts.len()).len();
            data.extend_from_slice(&bytes[*read..*read + len]);
            *read += len;
        }
        let TensorInfo { name, dtype, shape } = part.info.clone();
        let tensor = StoredTensor {
            name: name.clone(),
            dtype,
            shape,
            data: Bytes::from(data),
        };
        tensors.insert(name, tensor);
    }
    Ok(GatheredLayer(tensors))
}
