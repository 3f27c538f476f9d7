//! Who is in the cluster and who does what: membership stores, the partition plan, checkpoint reading, tokenizers.
