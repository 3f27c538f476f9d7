//! Bookkeeping of KV blocks: who holds which, what a block's content is, which may be given away. No memory, no device.

pub mod block_pool;
pub mod block_table;
pub mod blocks;
pub mod prefix_cache;
