//! What the keeper holds, for whom: sets, claims and limits, without sockets.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::packet;
use super::words::{
    Listed, MAX_FILES_OF_GUEST, MAX_GUESTS, Refused, Reply, Request, Why, check_name,
};

/// A connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Client {
    /// Never used twice.
    pub(super) number: usize,
    /// Its process.
    pub(super) pid: i32,
}

type Named = Vec<(String, OwnedFd)>;

struct Kept {
    files: Named,
    stored_by: i32,
    stored: Instant,
    claim: Option<Client>,
}

/// Everything that is held.
pub(super) struct Shelf {
    sets: BTreeMap<String, Kept>,
    /// Sets that are being put together, each by one client.
    staged: BTreeMap<(Client, String), Named>,
    max_files: usize,
    /// Takes what is let go. To close the last descriptor of a memfd means to free it, which
    /// takes minutes where it is large.
    let_go: Box<dyn FnMut(Vec<OwnedFd>)>,
}

impl Shelf {
    pub(super) fn new(max_files: usize, let_go: impl FnMut(Vec<OwnedFd>) + 'static) -> Self {
        let (sets, staged) = (BTreeMap::new(), BTreeMap::new());
        Self { sets, staged, max_files, let_go: Box::new(let_go) }
    }

    /// How many guests are held.
    pub(super) fn guests(&self) -> usize {
        self.sets.len()
    }

    /// Who has a claim on the guest that a request is about, if that stands in its way.
    pub(super) fn in_the_way(&self, client: Client, request: &Request) -> Option<Client> {
        let (Request::Commit { guest }
        | Request::Add { guest, .. }
        | Request::Drop { guest, .. }
        | Request::Claim { guest }
        | Request::Remove { guest }) = request
        else {
            return None;
        };
        self.sets.get(guest)?.claim.filter(|holder| *holder != client)
    }

    /// Does what a client asks.
    pub(super) fn take(
        &mut self,
        client: Client,
        request: Request,
        files: Vec<OwnedFd>,
    ) -> (Reply, Vec<BorrowedFd<'_>>) {
        let done = match request {
            Request::Put { guest, names } => self.put(client, guest, names, files),
            Request::Add { guest, names } => self.add(client, &guest, names, files),
            other => {
                (self.let_go)(files);
                match other {
                    Request::Fetch { guest, from } => return self.fetch(client, &guest, from),
                    Request::List => return (self.list(), Vec::new()),
                    Request::Commit { guest } => self.commit(client, guest),
                    Request::Drop { guest, names } => self.drop_files(client, &guest, &names),
                    Request::Claim { guest } => self.claim(client, &guest),
                    Request::Release { guest } => self.release(client, &guest),
                    Request::Remove { guest } => self.remove(client, &guest),
                    Request::Hello { .. } | Request::Put { .. } | Request::Add { .. } => {
                        Err((Why::Wrong, "hello is said first, and once".to_owned()))
                    }
                }
            }
        };
        (done.map_or_else(Reply::from, |()| Reply::Done), Vec::new())
    }

    /// A client's connection is at its end: its claims with it, and what it has not finished.
    pub(super) fn gone(&mut self, client: Client) {
        for kept in self.sets.values_mut() {
            kept.claim = kept.claim.filter(|holder| *holder != client);
        }
        let (gone, rest): (BTreeMap<_, _>, _) = std::mem::take(&mut self.staged)
            .into_iter()
            .partition(|((owner, _), _)| *owner == client);
        self.staged = rest;
        for files in gone.into_values() {
            (self.let_go)(unnamed(files));
        }
    }

    /// Whether a client has a claim on something.
    pub(super) fn is_holder(&self, client: Client) -> bool {
        self.sets.values().any(|kept| kept.claim == Some(client))
    }

    fn put(
        &mut self,
        client: Client,
        guest: String,
        names: Vec<String>,
        files: Vec<OwnedFd>,
    ) -> Result<(), Refused> {
        let key = (client, guest);
        let before = self.staged.get(&key).map_or(&[][..], |it| it);
        let checked = check_name(&key.1)
            .and_then(|()| self.check_files(&names, &files, before))
            .and_then(|()| match names.iter().find(|name| has(before, name)) {
                Some(name) => Err((Why::Wrong, format!("{name} is there twice"))),
                None => Ok(()),
            });
        if let Err(refused) = checked {
            // What it was to be a part of cannot become whole any more.
            let before = self.staged.remove(&key).unwrap_or_default();
            (self.let_go)(unnamed(before));
            (self.let_go)(files);
            return Err(refused);
        }
        self.staged.entry(key).or_default().extend(names.into_iter().zip(files));
        Ok(())
    }

    fn commit(&mut self, client: Client, guest: String) -> Result<(), Refused> {
        let Some(files) = self.staged.remove(&(client, guest.clone())) else {
            return Err((Why::Wrong, format!("nothing was put together for {guest}")));
        };
        if let Err(refused) = self.check_place(client, &guest) {
            (self.let_go)(unnamed(files));
            return Err(refused);
        }
        let (stored_by, stored) = (client.pid, Instant::now());
        let kept = Kept { files, stored_by, stored, claim: Some(client) };
        if let Some(old) = self.sets.insert(guest, kept) {
            (self.let_go)(unnamed(old.files));
        }
        Ok(())
    }

    /// Whether a client may store a guest of this name.
    fn check_place(&self, client: Client, guest: &str) -> Result<(), Refused> {
        if !self.sets.contains_key(guest) {
            let is_full = self.sets.len() >= MAX_GUESTS;
            let reason =
                || format!("{MAX_GUESTS} guests are held already: remove one that is over");
            return if is_full { Err((Why::Full, reason())) } else { Ok(()) };
        }
        match self.mine_or_free(client, guest)?.claim {
            Some(_) => Ok(()),
            None => {
                let reason = format!("{guest} is held already: claim it, or remove it, first");
                Err((Why::Claimed, reason))
            }
        }
    }

    fn add(
        &mut self,
        client: Client,
        guest: &str,
        names: Vec<String>,
        files: Vec<OwnedFd>,
    ) -> Result<(), Refused> {
        let checked = self
            .mine_or_free(client, guest)
            .map(|kept| &kept.files)
            .and_then(|before| self.check_files(&names, &files, before));
        if let Err(refused) = checked {
            (self.let_go)(files);
            return Err(refused);
        }
        let kept = self.sets.get_mut(guest).expect("just found");
        let mut replaced = Vec::new();
        for (name, file) in names.into_iter().zip(files) {
            match kept.files.iter_mut().find(|(other, _)| *other == name) {
                Some((_, old)) => replaced.push(std::mem::replace(old, file)),
                None => kept.files.push((name, file)),
            }
        }
        (self.let_go)(replaced);
        Ok(())
    }

    fn drop_files(&mut self, client: Client, guest: &str, names: &[String]) -> Result<(), Refused> {
        self.mine_or_free(client, guest)?;
        let kept = self.sets.get_mut(guest).expect("just found");
        let files = std::mem::take(&mut kept.files).into_iter();
        let (gone, rest): (Named, Named) = files.partition(|(name, _)| names.contains(name));
        kept.files = rest;
        (self.let_go)(unnamed(gone));
        Ok(())
    }

    fn claim(&mut self, client: Client, guest: &str) -> Result<(), Refused> {
        self.mine_or_free(client, guest)?;
        self.sets.get_mut(guest).expect("just found").claim = Some(client);
        Ok(())
    }

    fn release(&mut self, client: Client, guest: &str) -> Result<(), Refused> {
        self.mine(client, guest)?;
        self.sets.get_mut(guest).expect("just found").claim = None;
        Ok(())
    }

    fn remove(&mut self, client: Client, guest: &str) -> Result<(), Refused> {
        self.mine_or_free(client, guest)?;
        if let Some(old) = self.sets.remove(guest) {
            (self.let_go)(unnamed(old.files));
        }
        Ok(())
    }

    fn fetch(&self, client: Client, guest: &str, from: usize) -> (Reply, Vec<BorrowedFd<'_>>) {
        let kept = match self.mine(client, guest) {
            Ok(kept) => kept,
            Err(refused) => return (refused.into(), Vec::new()),
        };
        let batch = kept.files.iter().skip(from).take(packet::MAX_FILES);
        let names = batch.clone().map(|(name, _)| name.clone()).collect();
        let files = batch.map(|(_, file)| file.as_fd()).collect();
        (Reply::Files { names, total: kept.files.len() }, files)
    }

    fn list(&self) -> Reply {
        let guests = self.sets.iter().map(|(guest, kept)| Listed {
            guest: guest.clone(),
            files: kept.files.len(),
            stored_by: kept.stored_by,
            stored_us: kept.stored.elapsed().as_micros() as u64,
            claimed_by: kept.claim.map(|holder| holder.pid),
        });
        Reply::Guests { guests: guests.collect() }
    }

    /// A guest on which no other client has a claim.
    fn mine_or_free(&self, client: Client, guest: &str) -> Result<&Kept, Refused> {
        let Some(kept) = self.sets.get(guest) else {
            let shown: String = guest.chars().take(super::MAX_NAME).collect();
            return Err((Why::NotThere, format!("no guest {shown:?} is held")));
        };
        match kept.claim {
            Some(holder) if holder != client => Err((
                Why::Claimed,
                format!("{guest} is in use by process {}: stop that first", holder.pid),
            )),
            _ => Ok(kept),
        }
    }

    /// A guest on which this client has a claim.
    fn mine(&self, client: Client, guest: &str) -> Result<&Kept, Refused> {
        let kept = self.mine_or_free(client, guest)?;
        let unclaimed = || (Why::Wrong, format!("{guest} must be claimed first"));
        kept.claim.map(|_| kept).ok_or_else(unclaimed)
    }

    /// Whether these may be held beside those.
    fn check_files(
        &self,
        names: &[String],
        files: &[OwnedFd],
        before: &[(String, OwnedFd)],
    ) -> Result<(), Refused> {
        if names.len() != files.len() || names.is_empty() {
            let (names, files) = (names.len(), files.len());
            return Err((Why::Wrong, format!("{names} names came with {files} descriptors")));
        }
        for (index, name) in names.iter().enumerate() {
            check_name(name)?;
            if names[..index].contains(name) {
                return Err((Why::Wrong, format!("{name} is there twice")));
            }
        }
        if before.len() + files.len() > MAX_FILES_OF_GUEST {
            let reason = format!("more than {MAX_FILES_OF_GUEST} descriptors of one guest");
            return Err((Why::Full, reason));
        }
        let sets = self.sets.values().map(|kept| kept.files.len());
        let held: usize = sets.chain(self.staged.values().map(Vec::len)).sum();
        if held + files.len() > self.max_files {
            let most = self.max_files;
            let reason = format!(
                "{held} descriptors are held already, at most {most} are: remove guests that are \
                 over, or start the keeper with a larger --max-files"
            );
            return Err((Why::Full, reason));
        }
        Ok(())
    }
}

fn has(files: &[(String, OwnedFd)], name: &str) -> bool {
    files.iter().any(|(other, _)| other == name)
}

fn unnamed(files: Named) -> Vec<OwnedFd> {
    files.into_iter().map(|(_, file)| file).collect()
}
