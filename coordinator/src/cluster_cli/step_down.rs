//! `cluster step-down`.

use phalanx_proto::v1::{StepDownRequest, admin_client::AdminClient};

use super::{CliError, Command, connect::Coordinators, say, text};

pub(super) static STEP_DOWN: Command = Command {
    spec: || {
        clap::Command::new("step-down")
            .about("Gives leadership to a standby coordinator; waits until another coordinator leads")
    },
    run: |_, coordinators| Box::pin(step_down(coordinators)),
};

async fn step_down(coordinators: Coordinators) -> Result<(), CliError> {
    let answer = coordinators
        .ask(async |channel| Ok(AdminClient::new(channel).step_down(StepDownRequest {}).await?.into_inner()))
        .await?;
    say(&format!("{} leads", text::plain(&answer.leader)))
}
