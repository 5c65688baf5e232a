//! Threads that each compute a part of their own.

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

/// Threads for independent parts of one job, a batch of pictures each.
///
/// Products are split over the thread pool that they are asked for in. In training they are so small that threads would wait
/// for each other most of the time, so each worker is a pool of one thread: a product stays where it was asked for. For what
/// the tensor library splits in a pool of its own, see [`UNSPLIT`].
pub struct Workers(Vec<ThreadPool>);

/// Hears what is being done, how many parts of it are done, and of how many.
pub type Seen<'a> = dyn Fn(&'static str, usize, usize) + 'a;

impl Workers {
    /// `count` threads.
    pub fn new(count: usize) -> Result<Self> {
        if !(1..=MAX).contains(&count) {
            return Err(Error::Settings(format!(
                "{count} threads; 1 to {MAX} are possible"
            )));
        }
        let pool = |_| ThreadPoolBuilder::new().num_threads(1).build();
        let pools = (0..count).map(pool).collect::<std::result::Result<_, _>>();
        Ok(Workers(
            pools.map_err(|e| Error::Settings(format!("threads: {e}")))?,
        ))
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Runs `main` here and, at the same time, `work(i)` on each thread i.
    pub fn run<W: FnOnce() + Send, R>(&self, work: impl Fn(usize) -> W, main: impl FnOnce() -> R) -> R {
        std::thread::scope(|scope| {
            for (i, pool) in self.0.iter().enumerate() {
                let own = work(i);
                scope.spawn(move || pool.install(own));
            }
            // What the parts share, the sending side of a channel for instance, is now theirs alone.
            drop(work);
            main()
        })
    }

    /// `f` of each item, in the items' order; thread i takes the items i, i + count and so on.
    pub fn map<S: Sync, R: Send>(&self, items: &[S], f: impl Fn(&S) -> R + Sync) -> Vec<R> {
        self.watched(items, f, |_| ())
    }

    /// As [`Workers::map`]; `seen` hears here how much of `what` is done.
    pub fn shown<S: Sync, R: Send>(
        &self,
        (seen, what): (&Seen, &'static str),
        items: &[S],
        f: impl Fn(&S) -> R + Sync,
    ) -> Vec<R> {
        let mut done = 0;
        seen(what, done, items.len());
        self.watched(items, f, |_| {
            done += 1;
            seen(what, done, items.len());
        })
    }

    /// As [`Workers::map`]; `seen` hears here of each item that is done.
    pub fn watched<S: Sync, R: Send>(
        &self,
        items: &[S],
        f: impl Fn(&S) -> R + Sync,
        mut seen: impl FnMut(&S),
    ) -> Vec<R> {
        let (count, f) = (self.count(), &f);
        let (send, receive) = std::sync::mpsc::channel();
        let work = move |worker| {
            let send = send.clone();
            let own = items.iter().enumerate().skip(worker).step_by(count);
            // The receiver outlives the threads.
            move || own.for_each(|(i, item)| send.send((i, f(item))).expect("somebody receives"))
        };
        let done = |(i, _): &(usize, R)| seen(&items[*i]);
        let mut results: Vec<(usize, R)> = self.run(work, || receive.iter().inspect(done).collect());
        results.sort_by_key(|(i, _)| *i);
        results.into_iter().map(|(_, r)| r).collect()
    }
}

/// What a program that computes on [`Workers`] alone has in its environment: its tensor library then splits nothing. The library's
/// threads spin while they wait, so without this training takes twice the processor time. Results are the same.
pub const UNSPLIT: (&str, &str) = ("RAYON_NUM_THREADS", "1");

/// Makes this process one whose environment has a value for each of these names; to be called first of all in `main`.
///
/// Libraries take settings from the environment, which a program cannot change safely once it runs: it is started again with what
/// is missing, in the same process where the system can do that. What the user has set stays. If the start fails, the program
/// just goes on.
pub fn restart_with(wanted: &[(&str, &str)]) {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(name, _)| std::env::var_os(name).is_none())
        .collect();
    let (false, Ok(program)) = (missing.is_empty(), std::env::current_exe()) else {
        return;
    };
    let mut again = std::process::Command::new(program);
    again
        .args(std::env::args_os().skip(1))
        .envs(missing.into_iter().copied());
    #[cfg(unix)]
    // Returns only if it failed.
    let _ = std::os::unix::process::CommandExt::exec(&mut again);
    #[cfg(not(unix))]
    if let Ok(status) = again.status() {
        std::process::exit(status.code().unwrap_or(1));
    }
}

/// Most threads.
const MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_items_order_and_threads_are_pools_of_one() {
        let workers = Workers::new(3).unwrap();
        let items: Vec<usize> = (0..20).collect();
        let results = workers.map(&items, |&i| (i * i, rayon::current_num_threads()));
        let want: Vec<_> = items.iter().map(|i| (i * i, 1)).collect();
        assert_eq!(results, want);
        assert!(workers.map(&[0; 0], |&i| i).is_empty());
        assert!(Workers::new(0).is_err() && Workers::new(5000).is_err());
    }
}
