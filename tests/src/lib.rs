//! Everything, as a user would: real processes, real sockets, golden data.
