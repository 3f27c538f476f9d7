//! Large pages for weights and the KV cache: the hardware reads ahead within a page only, and large ones take fewer translations.
#![allow(unsafe_code)]

/// Size and boundary of a large page on x86-64 and most others.
#[cfg(target_os = "linux")]
const LARGE: usize = 2 << 20;

/// Asks the system to back the whole large pages within `bytes` by large pages. Only a hint; contents don't change.
#[cfg(target_os = "linux")]
pub(crate) fn prefer_large(bytes: &mut [u8]) {
    let skip = bytes.as_ptr().align_offset(LARGE);
    let Some(rest) = bytes.get_mut(skip..) else { return };
    let len = rest.len() / LARGE * LARGE;
    if len == 0 {
        return;
    }
    // SAFETY: the range is borrowed exclusively, page-aligned, and this advice keeps its contents.
    let result = unsafe { rustix::mm::madvise(rest.as_mut_ptr().cast(), len, rustix::mm::Advice::LinuxHugepage) };
    if let Err(e) = result {
        tracing::debug!("no large pages for {len} bytes: {e}");
    }
}

/// Nothing to ask for.
#[cfg(not(target_os = "linux"))]
pub(crate) fn prefer_large(_: &mut [u8]) {}
