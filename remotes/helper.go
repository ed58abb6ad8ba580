package remotes

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"distkit/disk/program"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Helper is a remote that a program dist-remote-NAME on PATH serves (dist-remote(7)). Its output is as untrusted as
// that of a registry.
type Helper struct {
	name, address string
	options       Options
}

const (
	maxHelperText = 4 << 10 // bytes read of the output of a put
	maxHelperLine = 1 << 20 // bytes of a line in a list
	// helperTries is how many processes are started in turn while each fails temporarily, for example because its
	// connection breaks.
	helperTries = 3
)

func (h *Helper) start(ctx context.Context, stdin io.Reader, verb string, args ...string) (*program.Process, error) {
	return program.Start(ctx, func(c *exec.Cmd) {
		c.Stdin = stdin
		inherited := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "DIST_HEADERS=") })
		c.Env = append(inherited, h.options.environment()...)
	}, "dist-remote-"+h.name, append([]string{verb, h.address}, args...)...)
}

// startFed starts a process with a pipe as standard input, and returns the pipe's writing end.
func (h *Helper) startFed(ctx context.Context, verb string, args ...string) (*program.Process, *os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	p, err := h.start(ctx, r, verb, args...)
	if err != nil {
		w.Close()
		return nil, nil, err
	}
	return p, w, nil
}

// environment returns the options as environment variables. Headers are left out, also those of the own environment ([Helper.start]), because
// they are for the registry only.
func (o Options) environment() (env []string) {
	is := map[bool]string{true: "1"}
	duration := func(d time.Duration) string {
		if d == 0 {
			return ""
		}
		return max(d, 0).String()
	}
	for _, v := range [][2]string{
		{"REGISTRY_AUTH_FILE", o.AuthFile}, {"DIST_HOSTS_DIR", o.HostsDir}, {"DIST_CA", strings.Join(o.CA, ":")}, {"DIST_MAX_WAIT", duration(o.MaxWait)},
		{"DIST_PLAIN_HTTP", is[o.PlainHTTP]}, {"DIST_INSECURE", is[o.Insecure]}, {"DIST_DEBUG", is[o.Debug != nil]}, {"DIST_TIMEOUT", duration(o.Timeout)},
	} {
		if v[1] != "" {
			env = append(env, v[0]+"="+v[1])
		}
	}
	return env
}

// object parses an object. It refuses one that a helper could mistake for something else, such as a flag.
func (h *Helper) object(id string) (d digest.Digest, isDigest bool, err error) {
	if d, isDigest, err = parseDigest(id); err != nil || isDigest {
		return d, isDigest, err
	}
	if !isName(id) || strings.HasPrefix(id, "-") {
		return "", false, classf(errdefs.ErrInvalidArgument, "not a name, tag or digest")
	}
	return "", false, nil
}

func (h *Helper) where() string { return h.name + "::" + h.address }

// retry calls f again after a temporary failure. Each call of f must start its own process.
func (h *Helper) retry(ctx context.Context, f func() error) error {
	t := newTries(helperTries, firstPause)
	return t.retry(f, func(err error) error { return t.wait(ctx, err) })
}

// Resolve asks the helper for a descriptor.
func (h *Helper) Resolve(ctx context.Context, object string) (ocispec.Descriptor, error) {
	desc, err := h.resolve(ctx, object)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("resolve %s in %s: %w", object, h.where(), err)
	}
	return desc, nil
}

func (h *Helper) resolve(ctx context.Context, object string) (desc ocispec.Descriptor, err error) {
	want, isDigest, err := h.object(object)
	if err != nil {
		return desc, err
	}
	var b []byte
	err = h.retry(ctx, func() error {
		p, err := h.start(ctx, nil, "resolve", object)
		if err != nil {
			return err
		}
		defer p.Close()
		b, err = io.ReadAll(io.LimitReader(p, MaxManifest))
		return err
	})
	if err != nil {
		return desc, err
	}
	desc.Size = -1 // a missing size must not count as 0
	if err := json.Unmarshal(b, &desc); err != nil || desc.Digest.Validate() != nil || desc.Size < 0 || !isMediaType(desc.MediaType) {
		return ocispec.Descriptor{}, classf(errdefs.ErrDataLoss, "dist-remote-%s printed something else than a descriptor", h.name)
	}
	if isDigest && desc.Digest != want {
		return ocispec.Descriptor{}, mismatch(want, desc.Digest)
	}
	return desc, nil
}

// Fetch returns the content of an object that is named by a name, tag or digest, verified.
func (h *Helper) Fetch(ctx context.Context, id string, hintList ...string) (io.ReadCloser, error) {
	body, err := h.fetch(ctx, id, parseHints(hintList))
	if err != nil {
		return nil, fmt.Errorf("fetch %s from %s: %w", id, h.where(), err)
	}
	return namedBody{body, "fetch " + id + " from " + h.where()}, nil
}

func (h *Helper) fetch(ctx context.Context, id string, hint hints) (body, error) {
	d, isDigest, err := h.object(id)
	if err != nil {
		return nil, err
	}
	if !isDigest {
		desc, err := h.resolve(ctx, id)
		if err != nil {
			return nil, err
		}
		if err := hint.check(desc.Size); err != nil {
			return nil, err
		}
		d, hint.size, hint.mediaType = desc.Digest, desc.Size, desc.MediaType
	}
	if hint.size >= 0 {
		if err := hint.check(hint.size); err != nil {
			return nil, err
		}
	}
	p, err := h.start(ctx, nil, "fetch", append([]string{d.String()}, hint.list()...)...)
	if err != nil {
		return nil, err
	}
	v := newVerifier(ctx, &sized{p, hint.offset, hint.size}, d, hint.offset, hint.offset, hint.size)
	v.cut(hint.end)
	return v, nil
}

// list returns the hints for a helper, in the form that parseHints parses.
func (h hints) list() (list []string) {
	if h.mediaType != "" {
		list = append(list, "mediatype:"+h.mediaType)
	}
	if h.size >= 0 {
		list = append(list, fmt.Sprintf("size:%d", h.size))
	}
	if h.offset > 0 {
		list = append(list, fmt.Sprintf("offset:%d", h.offset))
	}
	if h.end > h.offset {
		list = append(list, fmt.Sprintf("range:%d-%d", h.offset, h.end-1))
	}
	return list
}

// sized is a stream that begins at the given offset of an object of the given size, which is -1 if unknown. Read fails
// if the stream ends earlier or later.
type sized struct {
	io.ReadCloser
	offset, size int64
}

func (s *sized) Read(b []byte) (int, error) {
	n, err := s.ReadCloser.Read(b)
	s.offset += int64(n)
	if s.size >= 0 && (s.offset > s.size || err == io.EOF && s.offset < s.size) {
		return 0, classf(errdefs.ErrDataLoss, "size mismatch: got %s, not %d", sizeString(s.offset), s.size)
	}
	return n, err
}

// Push makes the helper store content. If the content doesn't match its digest, the helper is stopped before it has
// everything, and never sees the end of the content.
func (h *Helper) Push(ctx context.Context, id string, content io.Reader, hintList ...string) (Pushed, error) {
	hint := parseHints(hintList)
	hint.offset = 0 // the offset of a put applies to batches only
	pushed, err := h.push(ctx, id, content, hint)
	if err != nil {
		return Pushed{}, fmt.Errorf("put %s into %s: %w", id, h.where(), err)
	}
	return pushed, nil
}

func (h *Helper) push(ctx context.Context, id string, content io.Reader, hint hints) (Pushed, error) {
	in, desc, exists, err := h.outgoing(ctx, id, content, hint)
	if err != nil {
		return Pushed{}, err
	}
	if exists {
		return Pushed{desc, Exists}, nil
	}
	p, w, err := h.startFed(ctx, "put", append([]string{id}, hints{mediaType: desc.MediaType, size: desc.Size}.list()...)...)
	if err != nil {
		return Pushed{}, err
	}
	defer p.Close()
	copied, source := make(chan struct{}), make(chan error, 1)
	go func() {
		defer close(copied)
		buf := make([]byte, 64<<10)
		for {
			n, err := in.Read(buf)
			if _, werr := w.Write(buf[:n]); werr != nil {
				break // it reads no more, and its status says why
			}
			if err != nil {
				if err != io.EOF {
					source <- err
					p.StopAfter(0)
					_ = p.End()
				}
				break
			}
		}
		w.Close()
	}()
	output, err := io.ReadAll(io.LimitReader(p, maxHelperText))
	// If the helper didn't want the content, don't wait for the copying: the source may still have more.
	select {
	case err := <-source:
		return Pushed{}, err
	default:
	}
	if err != nil {
		return Pushed{}, err
	}
	state := State(strings.TrimSpace(string(output)))
	if state != Exists && state != Mounted {
		state = Stored
	}
	if desc.Size < 0 && state == Stored {
		<-copied
		desc.Size = in.offset
	} else if desc.Size < 0 {
		if desc, err = h.resolve(ctx, id); err != nil {
			return Pushed{}, err
		}
	}
	return Pushed{desc, state}, nil
}

// outgoing returns the content for the helper to store, and its descriptor. Reading fails if the content doesn't match
// its digest or size. exists reports, with Options.IfAbsent, that the tag already points at the manifest.
func (h *Helper) outgoing(ctx context.Context, id string, content io.Reader, hint hints) (in *sized, desc ocispec.Descriptor, exists bool, err error) {
	d, isDigest, err := h.object(id)
	if err != nil {
		return nil, desc, false, err
	}
	desc = ocispec.Descriptor{MediaType: hint.mediaType, Digest: d, Size: hint.size}
	if !isDigest {
		var manifest []byte
		if manifest, desc, err = readTagged(content, hint); err != nil {
			return nil, desc, false, err
		}
		if exists, err = h.hasTag(ctx, id, desc.Digest); exists || err != nil {
			return nil, desc, exists, err
		}
		content = bytes.NewReader(manifest)
	}
	return &sized{newVerifier(ctx, io.NopCloser(content), desc.Digest, hint.offset, hint.offset, -1), hint.offset, desc.Size}, desc, false, nil
}

// hasTag reports whether a tag already points at the manifest. AlreadyExists: it points at another one. Without
// Options.IfAbsent it asks for nothing and returns false.
func (h *Helper) hasTag(ctx context.Context, id string, d digest.Digest) (bool, error) {
	if !h.options.IfAbsent {
		return false, nil
	}
	old, err := h.resolve(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err == nil && old.Digest != d:
		err = errTagged(old.Digest)
	}
	return err == nil, err
}

// lines yields the lines of a helper's output. After a temporary failure it starts another process, unless lines have
// come.
func (h *Helper) lines(ctx context.Context, verb string, args ...string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		n := 0
		list := func() error {
			p, err := h.start(ctx, nil, verb, args...)
			if err != nil {
				return err
			}
			defer p.Close()
			s := bufio.NewScanner(p)
			s.Buffer(nil, maxHelperLine)
			for ; s.Scan(); n++ {
				if n == maxListed {
					return classf(errdefs.ErrDataLoss, "the list has more than %d", maxListed)
				}
				if !yield(s.Text(), nil) {
					return errStopped
				}
			}
			if errors.Is(s.Err(), bufio.ErrTooLong) {
				return classf(errdefs.ErrDataLoss, "the list has a line of more than %s", sizeString(maxHelperLine))
			}
			return s.Err()
		}
		var failed error
		err := h.retry(ctx, func() error {
			err := list()
			if n > 0 {
				failed, err = err, nil // another process can't continue the list
			}
			return err
		})
		if err = cmp.Or(err, failed); err != nil && err != errStopped {
			yield("", err)
		}
	}
}

// Tags lists the names that the helper prints.
func (h *Helper) Tags(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for name, err := range h.lines(ctx, "tags") {
			if err == nil && !isName(name) {
				err = classf(errdefs.ErrDataLoss, "invalid name %q in the list", printable(name))
			}
			if err != nil {
				yield("", fmt.Errorf("list tags of %s: %w", h.where(), err))
				return
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// Referrers lists the manifests that the helper prints as referrers of the subject.
func (h *Helper) Referrers(ctx context.Context, subject digest.Digest, filter ReferrerFilter) iter.Seq2[ocispec.Descriptor, error] {
	return func(yield func(ocispec.Descriptor, error) bool) {
		for line, err := range h.lines(ctx, "referrers", subject.String()) {
			var desc ocispec.Descriptor
			if err == nil && (json.Unmarshal([]byte(line), &desc) != nil || desc.Digest.Validate() != nil || desc.Size < 0) {
				err = classf(errdefs.ErrDataLoss, "dist-remote-%s printed something else than a descriptor", h.name)
			}
			if err != nil {
				yield(ocispec.Descriptor{}, fmt.Errorf("list referrers of %s in %s: %w", subject, h.where(), err))
				return
			}
			if filter.selects(desc) && !yield(desc, nil) {
				return
			}
		}
	}
}

// Delete makes the helper delete a tag or manifest.
func (h *Helper) Delete(ctx context.Context, id string) error {
	_, _, err := h.object(id)
	if err == nil {
		var p *program.Process
		if p, err = h.start(ctx, nil, "delete", id); err == nil {
			defer p.Close()
			_, err = io.Copy(io.Discard, p)
		}
	}
	if err != nil {
		return fmt.Errorf("delete %s from %s: %w", id, h.where(), err)
	}
	return nil
}
