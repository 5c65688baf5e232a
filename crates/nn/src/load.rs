//! From files, or their embedded content, to a model.

use std::borrow::Cow;
use std::path::Path;

use veiltune_engine::{Backend, Error as EngineError, Owner, Params};
use veiltune_hub::{AdapterConfig, Array, Checkpoint, Precision, Tensors, adapter};

pub use crate::backbone::{Backbone, BackboneConfig};
use crate::method::{Method, Private};
use crate::{Error, Result, peft};

/// Parameters from named arrays, as they are at their owner.
pub fn params<'a, B: Backend>(b: &'a B, owner: Owner, tensors: &'a Tensors) -> Params<'a, B> {
    Params::new(move |name, dims| {
        let array = tensors
            .get(name)
            .ok_or_else(|| EngineError::File("no such tensor".into()))?;
        if array.dims != dims {
            return Err(EngineError::File(format!(
                "shape is {:?}, not {dims:?}",
                array.dims
            )));
        }
        b.weight(owner, dims, Some(&array.values))
    })
}

/// Parameters from a checkpoint, each read when it is asked for.
pub fn checkpoint_params<'a, B: Backend>(b: &'a B, owner: Owner, file: &'a Checkpoint) -> Params<'a, B> {
    Params::new(move |name, dims| {
        let values = file
            .tensor(name, dims)
            .map_err(|e| EngineError::File(e.to_string()))?;
        b.weight(owner, dims, Some(&values))
    })
}

/// Parameters that somebody else owns: shapes alone.
pub fn shapes<'a, B: Backend>(b: &'a B, owner: Owner) -> Params<'a, B> {
    Params::new(move |_, dims| b.weight(owner, dims, None))
}

/// Names and shapes of everything that `model` asks for.
pub fn inventory<B: Backend, M>(
    b: &B,
    model: impl Fn(&Params<B>) -> Result<M>,
) -> Result<Vec<(String, Vec<usize>)>> {
    let seen = std::cell::RefCell::new(Vec::new());
    let params = Params::new(|name, dims: &[usize]| {
        seen.borrow_mut().push((name.to_owned(), dims.to_vec()));
        b.weight(Owner::Public, dims, Some(&vec![0.0; dims.iter().product()]))
    });
    model(&params)?;
    drop(params);
    Ok(seen.into_inner())
}

/// A private classifier as it was trained.
#[derive(Debug)]
pub struct Classifier {
    /// Method, architecture and calibration, and the backbone that it belongs to; public.
    pub config: AdapterConfig<Method>,
    /// Weights; secret.
    pub weights: Tensors,
}

impl Classifier {
    /// Reads an artefact in the PEFT layout.
    pub fn open(dir: &Path) -> Result<Self> {
        let (config, weights) = adapter::read(dir)?;
        Self::new(config, &weights)
    }

    /// From embedded content.
    pub fn from_bytes(config: &[u8], weights: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        let config = AdapterConfig::parse(adapter::CONFIG_FILE, config)?;
        Self::new(config, &Checkpoint::from_bytes(adapter::MODEL_FILE, weights)?)
    }

    fn new(config: AdapterConfig<Method>, weights: &Checkpoint) -> Result<Self> {
        config.method.check()?;
        let mut weights = weights.arrays()?;
        if let Some(lora) = config.method.lora() {
            weights = peft::restore(lora, weights)?;
        }
        Ok(Classifier { config, weights })
    }

    /// Writes an artefact in the PEFT layout, the configuration last; LoRA with the names that PEFT gives its tensors.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let Some(lora) = self.config.method.lora() else {
            return Ok(adapter::write(dir, &self.config, &self.weights, Precision::F32)?);
        };
        let mut method = serde_json::Value::from(self.config.method.clone());
        for (field, value) in peft::fields(lora) {
            method[field] = value;
        }
        let config = AdapterConfig {
            base_model_name_or_path: self.config.base_model_name_or_path.clone(),
            base_model_sha256: self.config.base_model_sha256.clone(),
            text: self.config.text,
            method,
        };
        Ok(adapter::write(
            dir,
            &config,
            &peft::store(lora, &self.weights),
            Precision::F32,
        )?)
    }

    /// The form in which it is served; `backbone` is needed where [`Method::needs_backbone`] says so.
    pub fn serve(&self, backbone: Option<&Backbone>) -> Result<Served> {
        let method = &self.config.method;
        let fetch = |name: &str, dims: &[usize]| fetch(backbone, name, dims);
        Ok(Served {
            private: Some(method.fold(&self.weights, &fetch)?),
            public: method.fold_public(&fetch)?,
            method: method.served(),
        })
    }
}

fn fetch(backbone: Option<&Backbone>, name: &str, dims: &[usize]) -> Result<Array> {
    let backbone = backbone.ok_or_else(|| {
        Error::Config("this method runs the backbone itself privately: its checkpoint is needed".into())
    })?;
    backbone.parameter(name, dims)
}

/// A private classifier in the form in which it is served.
#[derive(Clone, Debug)]
pub struct Served {
    /// Method, architecture and calibration; public.
    pub method: Method,
    /// The provider's parameters; None elsewhere.
    pub private: Option<Tensors>,
    /// The backbone's parameters that are part of the program; empty for planning and dealing, which need no values.
    pub public: Tensors,
}

impl Served {
    /// What planning and dealing need: shapes.
    pub fn shapes(method: &Method) -> Self {
        Served {
            method: method.served(),
            private: None,
            public: Tensors::new(),
        }
    }

    /// What the client has: the public parameters alone.
    pub fn client(method: &Method, backbone: &Backbone) -> Result<Self> {
        Ok(Served {
            public: method.fold_public(&|name, dims| backbone.parameter(name, dims))?,
            ..Self::shapes(method)
        })
    }

    /// The model on some interpreter; private parameters belong to `owner`.
    pub fn load<B: Backend>(&self, b: &B, owner: Owner) -> Result<Private<B>> {
        let private = match &self.private {
            Some(tensors) => params(b, owner, tensors),
            None => shapes(b, owner),
        };
        let public = match self.public.is_empty() {
            false => params(b, Owner::Public, &self.public),
            true => shapes(b, Owner::Public),
        };
        self.method.load(&private, &public)
    }
}

#[cfg(test)]
mod tests {
    use veiltune_engine::Plain;
    use veiltune_hub::{files, safetensors};

    use super::*;
    use crate::method::State;
    use crate::testing::{owc_config, random, vit_config};
    use crate::{Owc, Vit, owc};

    /// A file's content.
    fn stored(tensors: &Tensors) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        safetensors::write(&path, tensors, Precision::F32).unwrap();
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn embedded_content_gives_the_models_that_files_give() {
        let b = Plain::new();
        let (vit, owc) = (vit_config(), owc_config(2));
        let backbone = random(|p| Vit::load(&p.pp("vit"), &vit));
        let adapter = random(|p| Owc::load(p, &owc));
        let config = BackboneConfig {
            vit: vit.clone(),
            preprocess: None,
        };
        let json = serde_json::to_vec(&config).unwrap();

        let dir = tempfile::tempdir().unwrap();
        files::write_atomic(&dir.path().join("config.json"), &json).unwrap();
        files::write_atomic(&dir.path().join("model.safetensors"), &stored(&backbone)).unwrap();
        let classifier = Classifier {
            config: AdapterConfig {
                base_model_name_or_path: "t".into(),
                base_model_sha256: None,
                text: None,
                method: Method::Owc(owc),
            },
            weights: adapter.clone(),
        };
        classifier.write(dir.path()).unwrap();
        let artefact = serde_json::to_vec(&classifier.config).unwrap();

        let logits = |backbone: Backbone, classifier: Classifier| {
            let image = b.input(Owner::Public, &[1, 1, 8, 8], Some(&[0.5; 64])).unwrap();
            let hidden = backbone.load(&b).unwrap().forward(&b, &image).unwrap();
            let served = classifier.serve(None).unwrap();
            let reads = served.method.reads(hidden.len() - 1).unwrap();
            let inputs: Vec<_> = reads
                .iter()
                .map(|read| match read.state {
                    State::Hidden(i) => read.prepare(&b, &hidden[i]).unwrap(),
                    State::Patches => panic!("adapters read hidden states"),
                })
                .collect();
            let logits = served
                .load(&b, Owner::Public)
                .unwrap()
                .forward(&b, &inputs)
                .unwrap();
            assert_eq!(logits.dims(), [1, 3]);
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let embedded = logits(
            Backbone::from_bytes(&json, stored(&backbone)).unwrap(),
            Classifier::from_bytes(&artefact, stored(&adapter)).unwrap(),
        );
        assert_eq!(
            embedded,
            logits(
                Backbone::open(dir.path()).unwrap(),
                Classifier::open(dir.path()).unwrap()
            )
        );
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let b = Plain::new();
        let config = owc_config(1);
        let mut tensors = random(|p| Owc::load(p, &config));
        let load = |t: &Tensors| {
            Owc::load(&params(&b, Owner::Public, t), &config)
                .err()
                .unwrap()
                .to_string()
        };
        tensors.get_mut("head.weight").unwrap().dims = vec![1, 1];
        assert!(load(&tensors).contains("head.weight"), "{}", load(&tensors));
        assert!(
            owc::fold(&config, &tensors)
                .unwrap_err()
                .to_string()
                .contains("head.weight")
        );
        tensors.remove("adapters.0.down.bias");
        assert!(
            load(&tensors).contains("adapters.0.down.bias"),
            "{}",
            load(&tensors)
        );
        assert!(Classifier::from_bytes(b"{}", Vec::new()).is_err());
        assert!(Backbone::from_bytes(b"{\"hidden_size\": 1}", Vec::new()).is_err());
    }
}
