//! What a program can say of itself beside `--help`: completions for shells, and pages for `man`. Both are made of its
//! command line as clap has it, so they tell the options that there are.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Arg, Command, ValueHint, value_parser};
use clap_complete::Shell;

const COMPLETIONS: &str = "completions";
const MAN: &str = "man";
const SHELL: &str = "shell";
const FOLDER: &str = "folder";

/// Whether an argument names one of the commands.
pub fn is_command(argument: &OsStr) -> bool {
    argument == COMPLETIONS || argument == MAN
}

/// A program's command line with these commands in it.
#[must_use]
pub fn with_commands(program: Command) -> Command {
    let completions = Command::new(COMPLETIONS)
        .about("Prints a script that lets a shell complete this program's options")
        .after_help(
            "bash: PROGRAM completions bash > /usr/share/bash-completion/completions/PROGRAM\n\
             zsh:  PROGRAM completions zsh > \"${fpath[1]}/_PROGRAM\"\n\
             fish: PROGRAM completions fish > ~/.config/fish/completions/PROGRAM.fish",
        )
        .arg(Arg::new(SHELL).value_name("SHELL").required(true).value_parser(value_parser!(Shell)).help("Which shell"));
    let man = Command::new(MAN)
        .about("Writes the program's pages for man, one for each command, such as into /usr/local/share/man/man1")
        .arg(
            Arg::new(FOLDER)
                .value_name("FOLDER")
                .required(true)
                .value_parser(value_parser!(PathBuf))
                .value_hint(ValueHint::DirPath)
                .help("Where to; made if it is not there"),
        );
    program.subcommand(completions).subcommand(man)
}

/// Runs one of the commands of a program, whose command line has them. `args` begins with the program's name, the command
/// follows.
///
/// Exit codes: 0 if it worked, 2 for wrong options, 1 for everything else.
pub fn main_from(program: Command, args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match program.clone().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            // Nothing can be done where the terminal is gone.
            let _gone = error.print();
            return ExitCode::from(u8::from(error.use_stderr()) * 2);
        }
    };
    let name = program.get_name().to_owned();
    let done = match matches.subcommand() {
        Some((COMPLETIONS, options)) => match options.get_one::<Shell>(SHELL) {
            Some(shell) => completions(program, *shell).map(|script| io::Write::write_all(&mut io::stdout(), &script)),
            None => return ExitCode::from(2),
        },
        Some((MAN, options)) => match options.get_one::<PathBuf>(FOLDER) {
            Some(folder) => pages(program, folder).map(Ok),
            None => return ExitCode::from(2),
        },
        _ => return ExitCode::from(2),
    };
    match done.and_then(|written| written) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A shell's script.
fn completions(mut program: Command, shell: Shell) -> io::Result<Vec<u8>> {
    let name = program.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut program, name, &mut script);
    Ok(script)
}

/// A page for the program and one for each of its commands.
fn pages(program: Command, folder: &Path) -> io::Result<()> {
    let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
    fs::create_dir_all(folder).map_err(at)?;
    clap_mangen::generate_to(program, folder).map_err(at)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    fn program() -> Command {
        let tool = Command::new("tool").version("1.2").about("Does things").arg(Arg::new("deep").long("deep-water"));
        with_commands(tool.subcommand(Command::new("swim").about("Swims").arg(Arg::new("far").long("far"))))
    }

    #[test]
    fn the_command_line_is_consistent() {
        program().debug_assert();
    }

    #[test]
    fn every_shell_has_a_script_with_all_options() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(completions(program(), *shell).unwrap()).unwrap();
            for word in ["deep-water", "swim", "far", COMPLETIONS] {
                assert!(script.contains(word), "{shell}: no {word} in\n{script}");
            }
        }
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("share/man1");
        pages(program(), &folder).unwrap();
        let page = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert!(page("tool.1").contains(".TH tool 1") && page("tool.1").contains("\\-\\-deep\\-water"));
        assert!(page("tool-swim.1").contains("Swims"));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = pages(program(), &file.join("x")).unwrap_err().to_string();
        assert!(error.contains("file/x"), "{error}");
    }

    #[test]
    fn the_commands_are_known_by_name() {
        assert!(is_command(OsStr::new("completions")) && is_command(OsStr::new("man")));
        assert!(!is_command(OsStr::new("manual.gguf")));
    }
}
