//! Where a tensor lies: what both file formats are reduced to.

use std::ops::Range;

use candle_core::quantized::GgmlDType;

use super::gguf_names::RowOrder;

/// The type of a stored tensor: one that infold reads, or the format's name of another.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum StoredDtype {
    Known(GgmlDType),
    Other(String),
}

/// One tensor of an index.
#[derive(Debug, Clone)]
pub(super) struct TensorEntry {
    pub(super) dtype: StoredDtype,
    /// Row-major.
    pub(super) shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub(super) range: Range<usize>,
    pub(super) row_order: RowOrder,
}
