//! The preload library under a program that maps, remaps, forks, runs threads and execs: what is
//! named is served by a real page-client from a real page-server, what cannot be is refused
//! before the program touches it, and everything else is as without the library.

mod bystanders;
mod content;
mod exports;
mod process;
mod refusals;
mod roles;
mod scene;
mod serving;
mod tracking;
mod vmm;
