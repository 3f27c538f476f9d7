//! See `phalanx_coordinator::fuzzing::calls`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| phalanx_coordinator::fuzzing::calls(bytes));
