// SPDX-License-Identifier: MIT OR Apache-2.0
//! QMP, QEMU's control protocol: a line of JSON each way. Only what a harness needs; commands are not typed, because their
//! properties are QEMU's to check and change with its versions.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{Error, Result};

const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// A line that a time limit cut short; the rest comes with the next read.
    partial: Vec<u8>,
    /// Events that came while something else was waited for.
    events: Vec<Value>,
}

impl Qmp {
    /// Greets QEMU on a fresh connection.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let writer = stream.try_clone().map_err(Error::io("QMP"))?;
        writer
            .set_write_timeout(Some(ANSWER_LIMIT))
            .map_err(Error::io("QMP"))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
            writer,
            partial: Vec::new(),
            events: Vec::new(),
        };
        let greeting = qmp.message(Instant::now() + ANSWER_LIMIT)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::vm(format!("QMP: this is no greeting: {greeting}")));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    /// QEMU refuses it, or does not answer in time.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.writer
            .write_all(line.as_bytes())
            .map_err(Error::io(format!("QMP {command}")))?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut message = self.message(deadline)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                return Err(Error::vm(format!("QMP {command}: {error}")));
            }
            self.events.push(message);
        }
    }

    /// Waits for an event that fits; events before it are forgotten.
    ///
    /// # Errors
    /// It does not come in time.
    pub fn wait_for_event(
        &mut self,
        name: &str,
        limit: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let is_it = |message: &Value| {
            message.get("event").and_then(Value::as_str) == Some(name)
                && fits(message.get("data").unwrap_or(&Value::Null))
        };
        if let Some(at) = self.events.iter().position(is_it) {
            self.events.drain(..=at);
            return Ok(());
        }
        self.events.clear();
        let deadline = Instant::now() + limit;
        while !is_it(&self.message(deadline)?) {}
        Ok(())
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout {
                    what: "an answer of QEMU's".into(),
                    limit: ANSWER_LIMIT,
                    details: String::new(),
                });
            }
            self.reader
                .get_ref()
                .set_read_timeout(Some(left))
                .map_err(Error::io("QMP"))?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(Error::vm("QEMU closed its control connection")),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.partial);
                    let text = String::from_utf8_lossy(&self.partial).into_owned();
                    self.partial.clear();
                    return message.map_err(|error| Error::vm(format!("QMP: {error} in {text}")));
                }
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(Error::io("QMP")(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A QEMU that says these lines after the greeting's handshake, one for each command.
    fn qmp_with(answers: &'static [&'static str]) -> Qmp {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            writer.write_all(b"{\"QMP\": {}}\n").unwrap();
            for answer in [&["{\"return\": {}}"], answers].concat() {
                reader.read_line(&mut String::new()).unwrap();
                writer.write_all(answer.as_bytes()).unwrap();
                writer.write_all(b"\n").unwrap();
            }
        });
        Qmp::new(ours).unwrap()
    }

    #[test]
    fn execute_with_an_event_before_its_answer_keeps_the_event() {
        let mut qmp =
            qmp_with(&["{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n{\"return\": 7}"]);
        assert_eq!(qmp.execute("x", &json!({})).unwrap(), json!(7));
        qmp.wait_for_event("RESET", Duration::from_secs(1), |data| {
            data["guest"] == json!(true)
        })
        .unwrap();
    }

    #[test]
    fn execute_that_qemu_refuses_is_an_error_with_its_words() {
        let mut qmp = qmp_with(&["{\"error\": {\"desc\": \"no such device\"}}"]);
        let error = qmp.execute("device_del", &json!({})).unwrap_err();
        assert!(error.to_string().contains("no such device"), "{error}");
    }
}
