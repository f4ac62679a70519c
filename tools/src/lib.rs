//! The commands of Afterimage.
