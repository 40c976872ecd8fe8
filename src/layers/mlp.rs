//! The gated MLP: `down(silu(gate(x)) · up(x))`.

use candle_core::{Result, Tensor};

use super::linear::{Bias, OutputSlice, even_part};
use super::{ColumnParallel, ForwardContext, LayerError, Loader, RowParallel};

/// Gate and up in one column-parallel product, down row-parallel.
pub struct Mlp {
    gate_up: ColumnParallel,
    down: RowParallel,
}

impl Mlp {
    /// Loads `gate_proj`, `up_proj` and `down_proj` under `loader`.
    ///
    /// # Errors
    /// [`LayerError`] naming the tensor.
    pub fn load(
        loader: &Loader<'_>,
        hidden_size: usize,
        intermediate_size: usize,
        bias: Bias,
    ) -> std::result::Result<Self, LayerError> {
        let part = even_part(intermediate_size, loader.rank(), loader.world_size());
        let slice = |name| OutputSlice {
            name,
            out_features: intermediate_size,
            rows: part.clone(),
        };
        let slices = [slice("gate_proj"), slice("up_proj")];
        Ok(Self {
            gate_up: ColumnParallel::load(loader, hidden_size, &slices, bias)?,
            down: RowParallel::load(
                &loader.at("down_proj"),
                [hidden_size, intermediate_size],
                part.clone(),
                bias,
            )?,
        })
    }

    /// Maps `x` `[tokens, hidden_size]`, the normalised stream `residual`, and returns what is to
    /// be added and the stream as [`RowParallel::forward`] does.
    ///
    /// # Errors
    /// When a kernel fails.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Tensor,
        context: &ForwardContext<'_>,
    ) -> Result<(Option<Tensor>, Tensor)> {
        let activated = self.gate_up.forward_silu(x, context)?;
        self.down.forward(&activated, residual, context)
    }
}
