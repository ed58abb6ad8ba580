package copygraph_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"distkit/batch"
	"distkit/content"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The test binary is also a batch command, if SERVE names the directory of a store. At each start it adds a line to the
// file STARTS, and for each get a line to the file ASKED. LATEST is the target of its only tag. The first FAULTS
// processes write at most CUT bytes, or read at most that many, and exit with the status EXIT.
func TestMain(m *testing.M) {
	if dir := os.Getenv("SERVE"); dir != "" {
		os.Exit(serve(dir))
	}
	os.Exit(m.Run())
}

func serve(dir string) int {
	s, err := content.Open(dir)
	if err != nil {
		return 1
	}
	starts, err := os.OpenFile(os.Getenv("STARTS"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		return 1
	}
	_, _ = starts.WriteString("x")
	n, _ := starts.Seek(0, io.SeekCurrent)
	var in io.Reader = os.Stdin
	var out io.Writer = os.Stdout
	faults, _ := strconv.ParseInt(os.Getenv("FAULTS"), 10, 64)
	left, _ := strconv.ParseInt(os.Getenv("CUT"), 10, 64)
	exit, _ := strconv.Atoi(os.Getenv("EXIT"))
	switch f := (&fault{&left, exit}); {
	case n > faults:
	case os.Getenv("WHERE") == "in":
		in = reading{f, in}
	default:
		out = writing{f, out}
	}
	if answer(s, in, out) != nil {
		return 6
	}
	return 0
}

// answer serves a store.
func answer(s *content.Store, in io.Reader, out io.Writer) error {
	asked := io.Discard
	if name := os.Getenv("ASKED"); name != "" {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		asked = f
	}
	get := func(_ context.Context, r *batch.Request) func() (batch.Answer, error) {
		fmt.Fprintln(asked, r.Object)
		return func() (batch.Answer, error) {
			if r.Object == "latest" {
				r.Object = os.Getenv("LATEST")
			}
			f, err := s.File(digest.Digest(r.Object))
			if err != nil {
				return batch.Answer{}, err
			}
			for _, h := range r.Hints {
				if at, ok := strings.CutPrefix(h, "offset:"); ok {
					n, _ := strconv.ParseInt(at, 10, 64)
					_, _ = f.Seek(n, io.SeekStart)
				}
			}
			return batch.Answer{Word: "ok", Descriptor: v1.Descriptor{Digest: digest.Digest(r.Object), Size: f.Size()}, Content: f}, nil
		}
	}
	has := func(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
		return func() (batch.Answer, error) {
			if r.Object == "latest" {
				r.Object = os.Getenv("LATEST")
			}
			info, err := s.Info(ctx, digest.Digest(r.Object))
			if errdefs.IsNotFound(err) || err != nil && !strings.Contains(r.Object, ":") {
				return batch.Answer{Word: "no"}, nil
			}
			// Some registries state a wrong size in this way.
			return batch.Answer{Word: "yes", Descriptor: v1.Descriptor{Digest: info.Digest, Size: info.Size + 1}}, err
		}
	}
	put := func(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
		return func() (batch.Answer, error) {
			expected, _ := digest.Parse(r.Object)
			d, err := content.WriteBlob(ctx, s, r.Object, struct{ io.Reader }{r.Content}, 0, expected)
			return batch.Answer{Word: "stored", Descriptor: v1.Descriptor{Digest: d, Size: -1}}, err
		}
	}
	referrers := func(_ context.Context, r *batch.Request) func() (batch.Answer, error) {
		return func() (batch.Answer, error) {
			var list bytes.Buffer
			names, err := image.OpenNames(s, image.DefaultNamespace)
			if err == nil {
				err = names.Referrers(func(d v1.Descriptor, subject digest.Digest) error {
					if string(subject) != r.Object {
						return nil
					}
					d.Annotations = map[string]string{"text": strings.Repeat("x", 10000)}
					return json.NewEncoder(&list).Encode(d)
				})
			}
			return batch.Answer{Word: "ok", Descriptor: v1.Descriptor{Size: -1}, Content: io.NopCloser(&list)}, err
		}
	}
	mount := func(ctx context.Context, r *batch.Request) func() (batch.Answer, error) {
		return func() (batch.Answer, error) {
			info, err := s.Info(ctx, digest.Digest(r.Object))
			return batch.Answer{Word: "mounted", Descriptor: v1.Descriptor{Digest: info.Digest, Size: info.Size}}, err
		}
	}
	return batch.Serve(context.Background(), in, out, map[string]batch.Handler{"get": get, "has": has, "put": put, "mount": mount, "referrers": referrers})
}

// fault ends the process after that many bytes have passed.
type fault struct {
	left *int64
	exit int
}

func (f fault) pass(p []byte) []byte {
	if int64(len(p)) > *f.left {
		p = p[:*f.left]
	}
	*f.left -= int64(len(p))
	return p
}

type writing struct {
	*fault
	io.Writer
}

func (w writing) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(w.pass(p))
	if *w.left == 0 {
		os.Exit(w.exit)
	}
	return n, err
}

type reading struct {
	*fault
	io.Reader
}

func (r reading) Read(p []byte) (int, error) {
	if *r.left == 0 {
		os.Exit(r.exit)
	}
	n, err := r.Reader.Read(p[:min(int64(len(p)), *r.left)])
	r.pass(p[:n])
	return n, err
}

// served is a batch command that serves a store.
type served struct {
	*content.Store
	starts  string
	command string
}

func newServed(t *testing.T, s *content.Store, settings ...string) served {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	starts := filepath.Join(t.TempDir(), "starts")
	return served{s, starts, fmt.Sprintf("SERVE='%s' STARTS='%s' %s exec '%s'", s.Root(), starts, strings.Join(settings, " "), exe)}
}

func (s served) count(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(s.starts)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return len(b)
}

// noise stores an image whose layers have 300 KB each, and returns its manifest.
func noise(t *testing.T, s *content.Store, layers int) v1.Descriptor {
	t.Helper()
	r := rand.NewChaCha8([32]byte{1})
	var texts []string
	for range layers {
		b := make([]byte, 300_000)
		_, _ = r.Read(b)
		texts = append(texts, string(b))
	}
	return manifest(t, s, "amd64", texts...)
}

func TestFromACommand(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := index(t, from, noise(t, from, 5), nested(t, from))
	for what, c := range map[string]struct {
		settings []string
		starts   int // at least
		failed   func(error) bool
	}{
		"all is well":            {nil, 1, nil},
		"it is cut":              {[]string{"FAULTS=1 CUT=700000 EXIT=6"}, 2, nil},
		"it is cut in a line":    {[]string{"FAULTS=3 CUT=3 EXIT=0"}, 4, nil},
		"it is cut often":        {[]string{"FAULTS=9 CUT=400000 EXIT=141"}, 4, nil},
		"it never brings a byte": {[]string{"FAULTS=100 CUT=0 EXIT=6"}, 4, errdefs.IsAborted},
		"it is not allowed to":   {[]string{"FAULTS=100 CUT=0 EXIT=9"}, 1, errdefs.IsUnauthorized},
		"it isn't there":         {[]string{"no-such-command 2>/dev/null ||"}, 0, func(err error) bool { return strings.Contains(err.Error(), "status 127") }},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			to := open(t)
			source := newServed(t, from, c.settings...)
			if c.starts == 0 {
				source.command = "no-such-command 2>/dev/null"
			}
			command := copygraph.FromCommand(source.command, true)
			got, err := records(t, &copygraph.Copy{Documents: to, From: command, To: copygraph.IntoStore(to)}, root)
			_ = command.Close()
			// Objects that were under way when a process died may be sent again.
			if n := source.count(t); n < c.starts || n > max(c.starts, 10) || n > c.starts && what != "it is cut often" {
				t.Errorf("%d starts, not %d", n, c.starts)
			}
			if c.failed != nil {
				if err == nil || !c.failed(err) {
					t.Error(err)
				}
				return
			}
			if err != nil || count(got, copygraph.Stored) != len(got) {
				t.Errorf("%v, %v", got, err)
			}
			whole(t, to, root)
			// A command that gets no request is not started.
			source = newServed(t, from)
			command = copygraph.FromCommand(source.command, true)
			if _, err := records(t, &copygraph.Copy{Documents: to, From: command, To: copygraph.IntoStore(to)}, root); err != nil || source.count(t) != 0 {
				t.Errorf("again: %v, %d starts", err, source.count(t))
			}
		})
	}
}

// A process dies at each frame of its first request, or of the response. The request is repeated with another process.
func TestACommandThatDiesAtEachFrame(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	signature := attach(t, from, root, "a/signature", "signature")
	isRoot := func(d v1.Descriptor, err error) error {
		if err == nil && d.Digest != root.Digest {
			err = fmt.Errorf("got %s", d.Digest)
		}
		return err
	}
	source := func(f func(*copygraph.CommandSource) error) func(string) error {
		return func(command string) error {
			c := copygraph.FromCommand(command, true)
			return errors.Join(f(c), c.Close())
		}
	}
	target := func(f func(*copygraph.CommandTarget) (bool, error)) func(string) error {
		return func(command string) error {
			c := copygraph.IntoCommand(command)
			ok, err := f(c)
			if err == nil && !ok {
				err = errors.New("it says no")
			}
			return errors.Join(err, c.Close())
		}
	}
	hasAll := func(objects ...copygraph.Object) func(*copygraph.CommandTarget) (bool, error) {
		return func(c *copygraph.CommandTarget) (bool, error) {
			has, err := c.Has(t.Context(), objects)
			return !slices.Contains(has, false), err
		}
	}
	for what, c := range map[string]struct {
		request string
		ask     func(command string) error
	}{
		"the source has":  {"has latest\n", source(func(c *copygraph.CommandSource) error { return isRoot(c.Resolve(t.Context(), "latest")) })},
		"the source gets": {"get latest\n", source(func(c *copygraph.CommandSource) error { return isRoot(c.Take(t.Context(), "latest")) })},
		"the source lists": {"referrers " + string(root.Digest) + "\n", source(func(c *copygraph.CommandSource) error {
			var last v1.Descriptor
			err := c.Referrers()(t.Context(), root.Digest, func(d v1.Descriptor) error {
				last = d
				return nil
			})
			if err == nil && last.Digest != signature.Digest {
				err = fmt.Errorf("it lists %v", last)
			}
			return err
		})},
		"the target has":         {"has " + string(root.Digest) + "\n", target(hasAll(copygraph.Object{Descriptor: root}))},
		"the target has a tag":   {"has latest\n", target(hasAll(copygraph.Object{Tag: "latest", Descriptor: root}))},
		"the target has several": {"has latest\nhas latest\n", target(hasAll(copygraph.Object{Tag: "latest", Descriptor: root}, copygraph.Object{Descriptor: root}))},
		"the target mounts": {"mount " + string(root.Digest) + " a/b\n", target(func(c *copygraph.CommandTarget) (bool, error) {
			return c.Mount(t.Context(), root, "a/b")
		})},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			latest := "LATEST=" + string(root.Digest)
			run := exec.Command("sh", "-c", newServed(t, from, latest).command)
			run.Stdin = strings.NewReader(c.request)
			answer, err := run.Output()
			if err != nil {
				t.Fatal(err)
			}
			cuts := []int{0, 1}
			for i, b := range answer[:len(answer)-1] {
				if b == '\n' {
					cuts = append(cuts, i, i+1, i+2)
				}
			}
			dies := func(starts int, settings ...string) {
				t.Run(strings.Join(settings, " "), func(t *testing.T) {
					t.Parallel()
					s := newServed(t, from, append(settings, latest)...)
					if err := c.ask(s.command); err != nil {
						t.Error(err)
					}
					if n := s.count(t); n < starts || n > 2 {
						t.Errorf("%d starts, not %d", n, starts)
					}
				})
			}
			for _, cut := range append(cuts, len(answer)-1) {
				dies(2, "FAULTS=1 EXIT=6", fmt.Sprint("CUT=", cut))
			}
			dies(2, "WHERE=in FAULTS=1 EXIT=255", "CUT=0")
			dies(2, "WHERE=in FAULTS=1 EXIT=255", "CUT=5")
			dies(1, "WHERE=in FAULTS=1 EXIT=255", fmt.Sprint("CUT=", len(c.request))) // the process may have answered already
			s := newServed(t, from, "FAULTS=100 EXIT=6 CUT=3", latest)
			if err := c.ask(s.command); !errdefs.IsAborted(err) || s.count(t) != 4 {
				t.Errorf("it dies always: %d starts, %v", s.count(t), err)
			}
		})
	}
}

// A process that is alive has retried by itself, except if its helper died. It gets one more attempt.
func TestATemporaryAnswerIsAskedForOnceMore(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	const fails = `n=0; while read -r _; do n=$((n+1)); if [ $n -gt %d ]; then echo "yes - - -"; else echo "error 6 the link broke"; fi; done`
	for failures, ok := range []bool{true, true, false} {
		target := copygraph.IntoCommand(fmt.Sprintf(fails, failures))
		has, err := target.Has(t.Context(), []copygraph.Object{{Descriptor: root}})
		if ok != (err == nil && has[0]) || !ok && !errdefs.IsAborted(err) {
			t.Errorf("%d failures: %v, %v", failures, has, err)
		}
		if err := target.Close(); err != nil {
			t.Error(err)
		}
	}
}

// The config is copied before the layers, because it says what to do with them, and lower layers come before those on
// top of them. A layer that another process is storing does not delay the others.
func TestACommandIsAskedInOrder(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := noise(t, from, 30)
	b, err := os.ReadFile(filepath.Join(from.Root(), "blobs/sha256", root.Digest.Encoded()))
	if err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	number := map[string]int{}
	for i, d := range append([]v1.Descriptor{root, m.Config}, m.Layers...) {
		number[string(d.Digest)] = i
	}
	inOrder := slices.Sorted(maps.Values(number))
	for what, stored := range map[string]int{"into a store": -1, "while another process stores a layer": 3} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			list := filepath.Join(t.TempDir(), "asked")
			to, want := open(t), inOrder
			c := &copygraph.Copy{Documents: to, To: copygraph.IntoStore(to), Jobs: 8}
			if stored >= 0 {
				d := m.Layers[stored]
				w, err := to.Writer(t.Context(), "other", d.Size, d.Digest)
				if err != nil {
					t.Fatal(err)
				}
				left := len(m.Layers)
				c.Record = func(landed v1.Descriptor, _ copygraph.Outcome) error {
					if left--; left == 0 {
						return w.Abort() // all layers except this one have been stored
					}
					return nil
				}
				late := number[string(d.Digest)]
				want = slices.Concat(inOrder[:late], inOrder[late+1:], []int{late})
			}
			command := copygraph.FromCommand(newServed(t, from, "ASKED='"+list+"'").command, true)
			c.From = command
			if err := c.Run(t.Context(), root); err != nil {
				t.Fatal(err)
			}
			if err := command.Close(); err != nil {
				t.Error(err)
			}
			whole(t, to, root)
			asked, err := os.ReadFile(list)
			if err != nil {
				t.Fatal(err)
			}
			var got []int
			for _, object := range strings.Fields(string(asked)) {
				got = append(got, number[object])
			}
			if !slices.Equal(got, want) {
				t.Errorf("it was asked for %v, not for %v", got, want)
			}
		})
	}
}

func TestWhatACommandSaysIsNotTrusted(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	for what, command := range map[string]string{
		"no protocol":    "echo hello; cat >/dev/null",
		"another blob":   "echo ok sha256:" + strings.Repeat("0", 64) + " 5 -; cat >/dev/null",
		"other bytes":    fmt.Sprintf("echo ok %s %d -; echo %[2]d; head -c %[2]d /dev/zero; echo 0; echo end; cat >/dev/null", root.Digest, root.Size),
		"a long line":    "yes | tr -d '\\n'",
		"without end":    fmt.Sprintf("echo ok %s %d -; while echo 4 && echo 1234; do :; done", root.Digest, root.Size),
		"a sick trailer": fmt.Sprintf("echo ok %s 0 -; echo 0; echo 'error 300 x'; cat >/dev/null", root.Digest),
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			to := open(t)
			c := copygraph.FromCommand(command+" 2>/dev/null", true)
			_, err := records(t, &copygraph.Copy{Documents: to, From: c, To: copygraph.IntoStore(to)}, root)
			_ = c.Close()
			if !errdefs.IsDataLoss(err) {
				t.Error(err)
			}
			if _, err := to.Info(t.Context(), root.Digest); !errdefs.IsNotFound(err) {
				t.Errorf("something was stored: %v", err)
			}
		})
	}
}

func TestIntoACommand(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := index(t, from, noise(t, from, 5), nested(t, from))
	scratch := open(t)
	for what, c := range map[string]struct {
		settings []string
		failed   func(error) bool
	}{
		"all is well":           {nil, nil},
		"it reads no more":      {[]string{"FAULTS=1 WHERE=in CUT=700000 EXIT=6"}, nil},
		"it answers no more":    {[]string{"FAULTS=1 CUT=1100 EXIT=137"}, nil},
		"it never takes a byte": {[]string{"FAULTS=100 CUT=0 EXIT=6"}, errdefs.IsAborted},
		"it is not allowed to":  {[]string{"FAULTS=100 WHERE=in CUT=0 EXIT=9"}, errdefs.IsUnauthorized},
	} {
		for _, remote := range []bool{false, true} {
			t.Run(fmt.Sprint(what, remote), func(t *testing.T) {
				t.Parallel()
				to := newServed(t, open(t), c.settings...)
				target := copygraph.IntoCommand(to.command)
				g := &copygraph.Copy{Documents: from, To: target}
				if remote {
					source := copygraph.FromCommand(newServed(t, from, "FAULTS=2 CUT=1000000").command, false)
					defer source.Close()
					g.Documents, g.From = scratch, source
				}
				got, err := records(t, g, root)
				closed := target.Close()
				if c.failed != nil {
					if err == nil || !c.failed(err) {
						t.Error(err)
					}
					return
				}
				if err != nil || closed != nil || count(got, copygraph.Foreign) > 0 {
					t.Errorf("%v, %v, %v", got, err, closed)
				}
				whole(t, to.Store, root)
				target = copygraph.IntoCommand(to.command)
				g.To, g.DryRun = target, true
				if got, err = records(t, g, root); err != nil || count(got, copygraph.Exists) != len(got) {
					t.Errorf("again: %v, %v", got, err)
				}
				if err := target.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A target's refusal concerns one object only.
func TestRefusalsNameTheObject(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	refuse := `while read -r verb rest; do case $verb in has) echo "$answer";; *) echo "error 9 403 Forbidden";; esac; done`
	for what, c := range map[string]struct {
		command string
		tags    []string
		mount   func(digest.Digest) string
		want    string
	}{
		"has, of a tag":    {`answer="error 9 403 Forbidden"; ` + refuse, []string{"latest"}, nil, "latest: 403 Forbidden"},
		"has, of a digest": {`answer="error 9 403 Forbidden"; ` + refuse, nil, nil, "sha256:"},
		"mount":            {`answer=no; ` + refuse, nil, func(digest.Digest) string { return "other/place" }, " from other/place: 403 Forbidden"},
	} {
		target := copygraph.IntoCommand(c.command)
		err := (&copygraph.Copy{Documents: from, To: target, Tags: c.tags, Mount: c.mount, Jobs: 1}).Run(t.Context(), root)
		if !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
		_ = target.Close()
	}
}

// A target that fails when it ends has failed.
func TestACommandThatEndsBadly(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	target := copygraph.IntoCommand(strings.Replace(newServed(t, open(t)).command, "exec ", "", 1) + "; exit 8")
	if _, err := records(t, &copygraph.Copy{Documents: from, To: target}, root); err != nil {
		t.Fatal(err)
	}
	if err := target.Close(); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

func TestASilentCommandIsEnded(t *testing.T) {
	t.Parallel()
	from, to := open(t), open(t)
	root := manifest(t, from, "amd64", "layer")
	pid := filepath.Join(t.TempDir(), "pid")
	silent := fmt.Sprintf("echo $$ >'%s'; exec sleep 1000", pid)
	for what, c := range map[string]*copygraph.Copy{
		"source": {Documents: to, From: copygraph.FromCommand(silent, true), To: copygraph.IntoStore(to)},
		"target": {Documents: from, To: copygraph.IntoCommand(silent)},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			for ctx.Err() == nil {
				if b, err := os.ReadFile(pid); err == nil && bytes.HasSuffix(b, []byte("\n")) {
					cancel()
				}
				time.Sleep(time.Millisecond)
			}
		}()
		c.Jobs = 2
		if err := c.Run(ctx, root); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
		_ = os.Remove(pid)
		for _, end := range []any{c.From, c.To} {
			if end, ok := end.(io.Closer); ok {
				_ = end.Close()
			}
		}
	}
}

// leaver is a command that leaves a process running, which keeps the command's pipes open until the test is over.
func leaver(t *testing.T, command string) string {
	t.Helper()
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	end, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = end.Close() })
	return fmt.Sprintf("cat '%s' <&0 & %s", fifo, command)
}

// If a command dies, the copy does not wait for another process that has its pipes.
func TestACommandThatLeavesAProcessBehind(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := noise(t, from, 5)
	const cut = "FAULTS=1 CUT=700000 EXIT=6"
	t.Run("source", func(t *testing.T) {
		t.Parallel()
		to := open(t)
		source := copygraph.FromCommand(leaver(t, newServed(t, from, cut).command), true)
		finishes(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to), Jobs: 2}, root)
		_ = source.Close()
		whole(t, to, root)
	})
	t.Run("target", func(t *testing.T) {
		t.Parallel()
		to := newServed(t, open(t), "WHERE=in", cut)
		target := copygraph.IntoCommand(leaver(t, to.command))
		finishes(t, &copygraph.Copy{Documents: from, To: target, Jobs: 2}, root)
		if err := target.Close(); err != nil {
			t.Error(err)
		}
		whole(t, to.Store, root)
	})
}

// finishes runs a copy, and fails the test if it does not end.
func finishes(t *testing.T, c *copygraph.Copy, root v1.Descriptor) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- c.Run(t.Context(), root) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the copy waits for what does not come")
	}
}

func TestTags(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := index(t, from, nested(t, from))
	for what, ask := range map[string]func(*copygraph.CommandSource) (v1.Descriptor, error){
		"Resolve": func(c *copygraph.CommandSource) (v1.Descriptor, error) { return c.Resolve(t.Context(), "latest") },
		"Take":    func(c *copygraph.CommandSource) (v1.Descriptor, error) { return c.Take(t.Context(), "latest") },
	} {
		source := newServed(t, from, "LATEST="+string(root.Digest), "FAULTS=2 CUT=3 EXIT=6")
		c := copygraph.FromCommand(source.command, true)
		c.Start()
		d, err := ask(c)
		if err != nil || d.Digest != root.Digest || d.Size != root.Size && d.Size != -1 {
			t.Fatalf("%s: %v, %v", what, d, err)
		}
		to := open(t)
		got, err := records(t, &copygraph.Copy{Documents: to, From: c, To: copygraph.IntoStore(to)}, d)
		if err != nil || count(got, copygraph.Stored) != len(got) {
			t.Errorf("%s: %v, %v", what, got, err)
		}
		_ = c.Close()
		whole(t, to, root)
		c = copygraph.FromCommand(newServed(t, from, "LATEST="+string(digest.FromString("none"))).command, true)
		if d, err := ask(c); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v, %v", what, d, err)
		}
		_ = c.Close()
	}
	// A source may serve any bytes for the digest that it has stated.
	c := copygraph.FromCommand(fmt.Sprintf("echo ok %s 5 -; printf '5\nother0\nend\n'; cat >/dev/null", root.Digest), true)
	d, err := c.Take(t.Context(), "latest")
	if err == nil {
		to := open(t)
		_, err = records(t, &copygraph.Copy{Documents: to, From: c, To: copygraph.IntoStore(to)}, d)
	}
	if !errdefs.IsDataLoss(err) {
		t.Error(err)
	}
	_ = c.Close()
	c = copygraph.FromCommand("echo ok - - -; while echo 1000 && head -c 1000 /dev/zero; do :; done", true)
	if _, err := c.Take(t.Context(), "latest"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a document without end: %v", err)
	}
	_ = c.Close()
}
