package remotes

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"

	"golang.org/x/sys/unix"
)

// savedUpload keeps where an upload goes on, beside the tokens that processes share, so that
// the next process that puts the same blob into the same repository goes on with it after this
// one has died. The file is locked while an upload is under way: who finds it so begins one of
// its own. A nil one keeps nothing.
type savedUpload struct{ f *os.File }

type uploadState struct {
	URL   string `json:"url"` // may hold what lets its bearer write
	Chunk int64  `json:"chunk"`
}

func (p *push) openSaved() *savedUpload {
	c := p.client
	if c.shared == "" {
		return nil
	}
	f, err := sharedFile(c.shared, "upload", os.O_RDWR|os.O_CREATE,
		c.currentScheme(), c.host, c.path, c.login.identity, p.locator.Name, p.object.digest.String())
	if err != nil {
		return nil
	}
	s := &savedUpload{f}
	locked := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
	info, err := f.Stat()
	if now, serr := os.Lstat(f.Name()); !locked || err != nil || serr != nil || !os.SameFile(info, now) {
		s.close()
		return nil
	}
	return s
}

func (s *savedUpload) close() {
	if s != nil {
		s.f.Close()
	}
}

// forget takes the file away, before its lock is given up.
func (s *savedUpload) forget() {
	if s != nil {
		os.Remove(s.f.Name())
	}
}

// save is of what may be lost without harm: a torn one is none.
func (s *savedUpload) save(at session) {
	if s == nil {
		return
	}
	if b, err := json.Marshal(uploadState{at.url.String(), at.chunk}); err == nil && len(b) < maxTokenFile && s.f.Truncate(0) == nil {
		_, _ = s.f.WriteAt(b, 0)
	}
}

func (s *savedUpload) load() (at session, ok bool) {
	if s == nil {
		return at, false
	}
	var state uploadState
	if json.NewDecoder(io.NewSectionReader(s.f, 0, maxTokenFile)).Decode(&state) != nil {
		return at, false
	}
	u, err := url.Parse(state.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || state.Chunk < 0 || state.Chunk > maxChunkSize {
		return at, false
	}
	return session{u, state.Chunk}, true
}

// resume finds an upload that another process has begun, and how much of it the registry has.
// Where it has none of it, or does not know it any more, offset is 0.
func (p *push) resume() (s session, offset int64, err error) {
	s, ok := p.saved.load()
	if !ok {
		return s, 0, nil
	}
	tries := p.tries
	p.tries = p.client.newTries(2)
	offset, err = p.status(&s)
	p.tries = tries
	if p.ctx.Err() != nil {
		return s, 0, context.Cause(p.ctx)
	}
	if err != nil || p.hints.size >= 0 && offset > p.hints.size {
		return s, 0, nil
	}
	if offset > 0 && p.client.options.Debug != nil {
		p.client.options.Debug(fmt.Sprintf("the registry has %s of an upload that was begun before", sizeString(offset)))
	}
	return s, offset, nil
}
