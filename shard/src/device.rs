//! Devices by name. A backend is one line in `BACKENDS`.

use std::str::FromStr;

use phalanx_kernels::{
    CpuConfig, CpuOps, Isa,
    error::KernelError,
    ops::{Ops, Precision},
};

/// Which device, and how to use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// `cpu`, `cuda:0`, ...
    pub name: String,
    /// Threads of a CPU.
    pub threads: usize,
    /// Instruction set of a CPU; `None` for the fastest.
    pub isa: Option<Isa>,
}

/// A kind of device.
struct Backend {
    /// The device's name up to the colon.
    prefix: &'static str,
    open: Open,
}

type Open = fn(&DeviceConfig, Precision) -> Result<Box<dyn Ops>, KernelError>;

static BACKENDS: &[Backend] = &[Backend { prefix: "cpu", open: open_cpu }];

impl DeviceConfig {
    /// Makes the device ready; it holds nothing yet.
    ///
    /// # Errors
    /// If there's no such device in this build or machine.
    pub fn open(&self, precision: Precision) -> Result<Box<dyn Ops>, KernelError> {
        let prefix = self.name.split(':').next().unwrap_or_default();
        match BACKENDS.iter().find(|backend| backend.prefix == prefix) {
            Some(backend) => (backend.open)(self, precision),
            None => Err(KernelError::NoDevice {
                name: self.name.clone(),
                reason: match prefix {
                    "cuda" => "this build has no CUDA backend yet: use --device cpu".to_owned(),
                    _ => "no such kind of device: use --device cpu".to_owned(),
                },
            }),
        }
    }
}

fn open_cpu(config: &DeviceConfig, precision: Precision) -> Result<Box<dyn Ops>, KernelError> {
    if config.name != "cpu" {
        return Err(KernelError::NoDevice {
            name: config.name.clone(),
            reason: "the CPU has no number: use --device cpu".to_owned(),
        });
    }
    let cpu = CpuConfig { threads: config.threads, isa: config.isa, ..CpuConfig::new(precision) };
    Ok(Box::new(CpuOps::new(cpu)?))
}

/// The instruction set that `auto` or a name stands for.
///
/// # Errors
/// If there's none of that name.
pub fn isa_of(name: &str) -> Result<Option<Isa>, KernelError> {
    match name {
        "auto" => Ok(None),
        "avx512" => Ok(Some(Isa::Avx512Vnni)),
        name => Isa::from_str(name).map(Some),
    }
}

/// The precision that a `--dtype` stands for.
pub fn precision_of(dtype: &str) -> Option<Precision> {
    match dtype {
        "auto" => Some(Precision::Auto),
        "float32" => Some(Precision::Float32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(name: &str) -> Result<String, String> {
        let config = DeviceConfig { name: name.to_owned(), threads: 1, isa: None };
        config.open(Precision::Auto).map(|ops| ops.name()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_cpu_opens_and_other_devices_say_why_not() {
        assert!(open("cpu").expect("a CPU").starts_with("cpu"));
        assert!(open("cuda:0").expect_err("no CUDA").contains("no CUDA backend"));
        assert!(open("cpu:1").expect_err("no number").contains("no number"));
        assert!(open("tpu").expect_err("no TPU").contains("no such kind"));
    }

    #[test]
    fn names_are_parsed() {
        assert_eq!(isa_of("auto").expect("a name"), None);
        assert_eq!(isa_of("scalar").expect("a name"), Some(Isa::Scalar));
        assert!(isa_of("mmx").is_err());
        assert_eq!(precision_of("float32"), Some(Precision::Float32));
        assert_eq!(precision_of("int2"), None);
    }
}
