//! Simulates sessions.
