//! Everything that needs only the public interface, in one program.

mod gradients;
mod layer;
mod mixers;
mod model;
mod operator;
mod plain;
