//! Who a span is, as W3C Trace Context has it.

use phalanx_cluster::hex::hex;

/// Identity of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanContext {
    /// The trace.
    pub trace: [u8; 16],
    /// The span in it.
    pub span: [u8; 8],
    /// Whether it is recorded.
    pub is_sampled: bool,
}

impl SpanContext {
    /// From a `traceparent` header. `None` if it is not well formed: then a new trace begins, as the standard wants it.
    pub fn parse(header: &str) -> Option<Self> {
        let mut fields = header.trim().split('-');
        let (version, trace, span, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let [version] = from_hex(version)?;
        // Later versions may have more fields; 255 is none.
        if version == 255 || (version == 0 && fields.next().is_some()) {
            return None;
        }
        let (trace, span): ([u8; 16], [u8; 8]) = (from_hex(trace)?, from_hex(span)?);
        let [flags] = from_hex(flags)?;
        let is_nobody = trace == [0; 16] || span == [0; 8];
        (!is_nobody).then_some(Self { trace, span, is_sampled: flags & 1 == 1 })
    }

    /// Of a new trace, with this probability.
    pub fn drawn(ratio: f64) -> Option<Self> {
        let trace = uuid::Uuid::new_v4().into_bytes();
        let [.., a, b, c, d] = trace;
        let draw = f64::from(u32::from_be_bytes([a, b, c, d])) / (f64::from(u32::MAX) + 1.0);
        (draw < ratio).then(|| Self { trace, span: new_span(), is_sampled: true })
    }

    /// A new span of the same trace.
    pub fn child(self) -> Self {
        Self { span: new_span(), ..self }
    }

    /// The trace's id as logs and collectors show it.
    pub fn trace_id(&self) -> String {
        hex(&self.trace)
    }
}

fn new_span() -> [u8; 8] {
    let random = uuid::Uuid::new_v4().into_bytes();
    let mut span = [0; 8];
    // The other half has the version.
    span.copy_from_slice(&random[8..]);
    span
}

/// Bytes from lower-case digits, of exactly that many.
fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N || !digits.iter().all(|d| matches!(d, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_s_span_is_read() {
        let header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let context = SpanContext::parse(header).unwrap();
        assert_eq!(context.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!((context.span[1], context.is_sampled), (0xf0, true));
        let child = context.child();
        assert_eq!(child.trace, context.trace);
        assert_ne!(child.span, context.span);
        let unsampled = SpanContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").unwrap();
        assert!(!unsampled.is_sampled);
        assert!(SpanContext::parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more").is_some());
    }

    #[test]
    fn what_is_not_well_formed_is_nothing() {
        for wrong in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e473\u{e9}-00f067aa0ba902b7-01",
        ] {
            assert_eq!(SpanContext::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_ratio_decides_how_many_are_drawn() {
        let n = |ratio: f64| (0..4000).filter(|_| SpanContext::drawn(ratio).is_some()).count();
        assert_eq!((n(0.0), n(1.0)), (0, 4000));
        assert!((500..1500).contains(&n(0.25)), "beyond twenty standard deviations");
    }
}
