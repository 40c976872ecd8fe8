//! distributed.
