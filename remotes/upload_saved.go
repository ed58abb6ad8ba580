package remotes

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"

	"golang.org/x/sys/unix"

	"distkit/disk"
)

// savedUpload is a file with an upload session, in the directory that processes share. Another process that puts the
// same blob into the same repository resumes the session if this process dies. The file is locked during the upload; a
// process that finds it locked starts its own upload. A nil savedUpload saves nothing.
type savedUpload struct{ f *os.File }

type uploadState struct {
	URL   string `json:"url"` // may grant write access to its bearer
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
	if locked := disk.Lock(f, unix.LOCK_EX|unix.LOCK_NB) == nil; !locked || !disk.Names(f.Name(), f) {
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

// forget removes the file. The caller still holds its lock.
func (s *savedUpload) forget() {
	if s != nil {
		os.Remove(s.f.Name())
	}
}

// save saves the session. It may fail or be torn; the next process then starts its own upload.
func (s *savedUpload) save(sess session) {
	if s == nil {
		return
	}
	if b, err := json.Marshal(uploadState{sess.url.String(), sess.least}); err == nil && len(b) < maxTokenFile && s.f.Truncate(0) == nil {
		_, _ = s.f.WriteAt(b, 0)
	}
}

func (s *savedUpload) load() (sess session, ok bool) {
	if s == nil {
		return sess, false
	}
	var state uploadState
	if json.NewDecoder(io.NewSectionReader(s.f, 0, maxTokenFile)).Decode(&state) != nil {
		return sess, false
	}
	to, err := url.Parse(state.URL)
	if err != nil || to.Scheme != "http" && to.Scheme != "https" || to.User != nil || state.Chunk < 0 || state.Chunk > maxChunkSize {
		return sess, false
	}
	return session{to, state.Chunk}, true
}

// resume continues an upload that another process has begun, if the registry still has some of it.
func (u *blobUpload) resume() error {
	s, ok := u.saved.load()
	if !ok {
		return nil
	}
	u.session = s
	tries := u.tries
	u.tries = u.client.newTries(2)
	have, err := u.status()
	u.tries = tries
	if u.ctx.Err() != nil {
		return context.Cause(u.ctx)
	}
	if err != nil || have <= 0 || u.size >= 0 && have > u.size {
		return nil
	}
	u.acked, u.sent, u.most, u.resumedAt, u.chunk = have, have, have, have, max(u.chunk, s.least)
	if u.client.options.Debug != nil {
		u.client.options.Debug(fmt.Sprintf("resuming an upload: the registry has %s of it", sizeString(have)))
	}
	return nil
}
