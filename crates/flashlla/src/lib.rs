//! Local Linear Attention.
