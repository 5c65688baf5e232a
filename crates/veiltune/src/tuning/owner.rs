//! The data owner's side of a run: its texts and prompts as shares, and the logits that come back.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use veiltune_engine::Error as EngineError;
use veiltune_engine::gates::SCALE;
use veiltune_ring::codec;
use veiltune_ring::prg::{Prg, Seed};
use veiltune_wire::Link;

use super::lookup::{self, Holder, RowKeys};
use super::program::{Pass, Shape};
use super::servers::{Request, Role, Run, Station, patiently};
use super::store::{Listed, PublicModel, check_name};
use super::talk;
use crate::{Error, Result};

/// Addresses of the servers and the assistant.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Of server 0 and server 1.
    pub servers: [String; 2],
    /// Of the assistant.
    pub assistant: String,
}

/// The models that both servers have.
pub fn models(station: &Station, addresses: &Addresses) -> Result<Vec<Listed>> {
    let [mut first, second]: [Vec<Listed>; 2] = ask_both(station, addresses, &Request::Models)?;
    first.retain(|m| second.contains(m));
    first.iter().try_for_each(|m| check_name(&m.name))?;
    Ok(first)
}

/// What is public of one of them, which must be the same at both.
pub fn model(station: &Station, addresses: &Addresses, fingerprint: &str) -> Result<PublicModel> {
    let request = Request::Model(fingerprint.to_owned());
    let [first, second]: [PublicModel; 2] = ask_both(station, addresses, &request)?;
    first.check()?;
    match first == second && first.fingerprint == fingerprint {
        true => Ok(first),
        false => Err(Error::Refused(format!(
            "the servers say different things of the model {}: have its owner share it again",
            first.name
        ))),
    }
}

fn ask_both<T: DeserializeOwned>(
    station: &Station,
    addresses: &Addresses,
    request: &Request,
) -> Result<[T; 2]> {
    let ask = |role: Role, address: &str| {
        patiently(|| {
            let link = station.call(role, address)?;
            talk::send(&link, request)?;
            let answer: T = talk::receive(&link)?;
            link.close()?;
            Ok(answer)
        })
    };
    let [first, second] = &addresses.servers;
    Ok([ask(Role::Server0, first)?, ask(Role::Server1, second)?])
}

/// The texts of a run, as numbers; secret, and so without `Debug`.
pub struct Encoded {
    /// Token ids of training and validation texts, `[texts + validation, tokens]`, then the label words.
    pub ids: Vec<u32>,
    /// 1 where a token is part of its text, `[texts + validation, tokens]`.
    pub keep: Vec<f32>,
}

/// A run that has begun.
pub struct Remote {
    links: [Arc<dyn Link>; 2],
    assistant: Arc<dyn Link>,
    /// What server 0 expands its shares from, and how many inputs there were.
    seed: Seed,
    next: u64,
    shape: Shape,
}

impl Remote {
    /// Calls all three, once they are free, deals the keys of the word lookup and brings the texts in.
    pub fn begin(
        station: &Station,
        addresses: &Addresses,
        run: &Run,
        vocabulary: usize,
        texts: &Encoded,
    ) -> Result<Remote> {
        let keys = texts
            .ids
            .iter()
            .map(|&id| lookup::deal(id as usize, vocabulary))
            .collect::<Result<Vec<RowKeys>>>()?;
        patiently(|| {
            let mut called = Vec::new();
            Remote::try_to_begin(station, addresses, run, &keys, texts, &mut called).inspect_err(|e| {
                called
                    .iter()
                    .for_each(|link: &Arc<dyn Link>| link.abort(&e.for_peer()))
            })
        })
    }

    fn try_to_begin(
        station: &Station,
        addresses: &Addresses,
        run: &Run,
        keys: &[RowKeys],
        texts: &Encoded,
        called: &mut Vec<Arc<dyn Link>>,
    ) -> Result<Remote> {
        let seed = Seed::random().map_err(EngineError::from)?;
        let mut begin = |role: Role, holder: Holder, address: &str| -> Result<Arc<dyn Link>> {
            let link = station.call(role, address)?;
            called.push(link.clone());
            talk::send(&link, &Request::Run(run.clone()))?;
            // It has the model, and room for the run.
            link.recv(&mut [0])?;
            if role == Role::Server0 {
                link.send(seed.expose().to_vec())?;
            }
            lookup::send_keys(&link, holder, keys)?;
            Ok(link)
        };
        // The assistant first: the servers call it once they have been called. So who has it has its turn at all three.
        let assistant = begin(Role::Assistant, Holder::Assistant, &addresses.assistant)?;
        let first = begin(Role::Server0, Holder::First, &addresses.servers[0])?;
        let second = begin(Role::Server1, Holder::Second, &addresses.servers[1])?;
        let mut remote = Remote {
            assistant,
            links: [first, second],
            seed,
            next: 0,
            shape: run.shape.clone(),
        };
        remote.ask(Some(Pass::Texts))?;
        let signs: Vec<f32> = keys.iter().flat_map(|k| k.signs).collect();
        remote.input(&signs)?;
        remote.input(&texts.keep)?;
        Ok(remote)
    }

    /// The label words' logits `[prompts, texts, labels]` of prompts `[prompts, slots, hidden]`: a generation's on the texts to
    /// tune on, or one prompt's on those to validate on.
    pub fn logits(&mut self, pass: Pass, prompts: &[f32]) -> Result<Vec<f32>> {
        let texts = match pass {
            Pass::Generation => self.shape.candidates * self.shape.texts,
            Pass::Validation => self.shape.validation,
            Pass::Texts => return Err(Error::Input("the texts are in already".into())),
        };
        self.ask(Some(pass))?;
        self.input(prompts)?;
        let len = texts * self.shape.labels;
        let mut sum = vec![0u64; len];
        for link in &self.links {
            let mut at = 0;
            let add = |piece: &[u64]| {
                for (s, w) in sum[at..].iter_mut().zip(piece) {
                    *s = s.wrapping_add(*w);
                }
                at += piece.len();
            };
            talk::receive_words(link, add, len)?;
        }
        Ok(codec::decode(&sum, SCALE).into_iter().map(|v| v as f32).collect())
    }

    /// Ends the run.
    pub fn end(self) -> Result<()> {
        self.ask(None)?;
        for link in self.links.iter().chain([&self.assistant]) {
            link.close()?;
        }
        Ok(())
    }

    /// Gives up, and tells the others why.
    pub fn abort(&self, reason: &str) {
        let links = self.links.iter().chain([&self.assistant]);
        links.for_each(|link| link.abort(reason));
    }

    /// Sizes of the run.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What tells the bytes that went to the three others and came from them so far.
    pub fn counter(&self) -> impl Fn() -> [u64; 2] + use<> {
        let links: Vec<_> = self.links.iter().chain([&self.assistant]).cloned().collect();
        move || {
            links.iter().fold([0, 0], |[sent, received], link| {
                let meter = link.meter();
                [sent + meter.sent, received + meter.received]
            })
        }
    }

    fn ask(&self, pass: Option<Pass>) -> Result<()> {
        let message = [u8::from(pass.is_some()), pass.map_or(0, Pass::number)];
        Ok(self
            .links
            .iter()
            .try_for_each(|link| link.send(message.to_vec()))?)
    }

    /// Server 0 expands its share, server 1 is sent the rest.
    fn input(&mut self, values: &[f32]) -> Result<()> {
        let wide = values.iter().map(|v| f64::from(*v));
        let words = codec::encode(wide, SCALE).map_err(EngineError::from)?;
        let first = Prg::new(&self.seed, self.next, 0).vec(words.len());
        self.next += 1;
        let second: Vec<u64> = words.iter().zip(first).map(|(w, f)| w.wrapping_sub(f)).collect();
        Ok(talk::send_words(&self.links[1], &second)?)
    }
}

/// The fingerprint of the model that is asked for, of those that the servers have.
pub fn find(models: &[Listed], name: Option<&str>) -> Result<String> {
    let known = |models: &[&Listed]| -> String {
        let one = |m: &&Listed| {
            format!(
                "{} ({})",
                m.name,
                m.fingerprint.get(..12).unwrap_or(&m.fingerprint)
            )
        };
        models.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let fits = |m: &&Listed| name.is_none_or(|n| m.name == n || m.fingerprint.starts_with(n));
    let fit: Vec<&Listed> = models.iter().filter(fits).collect();
    match fit[..] {
        [model] => Ok(model.fingerprint.clone()),
        [] => Err(Error::Input(format!(
            "both servers have {}; have its owner `veiltune share` the model, or give another name to --model",
            match models.is_empty() {
                true => "no model".into(),
                false => known(&models.iter().collect::<Vec<_>>()),
            }
        ))),
        _ => Err(Error::Input(format!(
            "the servers have {}: say which one with --model, by its name or the beginning of its fingerprint",
            known(&fit)
        ))),
    }
}
