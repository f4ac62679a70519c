//! Moves a running guest between two processes and verifies every page.

fn main() {}
