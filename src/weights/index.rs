//! Where a tensor lies: what both file formats are reduced to.

use std::ops::Range;

use candle_core::quantized::GgmlDType;

/// The type of a stored tensor: one that infold reads, or the format's name of another.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum StoredDtype {
    Known(GgmlDType),
    Other(String),
}

/// How the rows of a tensor in the file relate to those of the Hugging Face checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As in the Hugging Face checkpoint.
    AsStored,
    /// Each head's rows are interleaved, as llama.cpp's rotary embedding of adjacent pairs wants.
    Interleaved { num_heads: usize },
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
