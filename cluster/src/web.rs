//! How other servers are asked over HTTP.

use ureq::{
    Agent,
    config::ConfigBuilder,
    tls::{RootCerts, TlsConfig},
    typestate::AgentScope,
};

/// Of an agent that trusts the authorities that the system trusts.
pub fn agent() -> ConfigBuilder<AgentScope> {
    // ureq takes the ring provider; its own default is a list of roots that was compiled in.
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
    Agent::config_builder().tls_config(tls)
}
