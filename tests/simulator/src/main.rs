//! Simulates sessions from seeds.

fn main() {}
