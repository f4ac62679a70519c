//! Postcopy memory for virtual machines.
#![allow(dead_code)]
mod destination;
mod sys;
