//! Page servers that are killed, and their successors; a destination that checks every page.

mod fence;
mod files;
mod given;
mod scene;
mod trouble;
