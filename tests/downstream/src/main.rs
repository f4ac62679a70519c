//! The smallest program that links the engine.

use afterimage as _;

fn main() {
    println!("afterimage is linked");
}
