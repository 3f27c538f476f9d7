//! The wire of Phalanx: generated types of the `.proto` files, and how coordinators are dialled; no other logic.
//!
//! `common.proto` holds what several conversations share, `step.proto` the plan and result of a step,
//! `cluster.proto` how shards join and are told what to do, `leadership.proto` what coordinators tell
//! each other, `admin.proto` what operators change, `generate.proto` what clients call.

pub mod dial;

/// Types of the package `phalanx.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("phalanx.v1");

    /// Encoded `FileDescriptorSet` of the package, for the gRPC reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
