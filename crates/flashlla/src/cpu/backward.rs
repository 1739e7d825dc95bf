//! The backward.
