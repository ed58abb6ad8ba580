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
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	ondisk "distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// helperMain is the program dist-remote-test, when this test binary is started under that name: it serves a directory
// as a remote. HELPER_FAULT makes it misbehave.
func helperMain(args []string) int {
	ctx := context.Background()
	verb, address, rest := args[0], args[1], args[2:]
	if log := os.Getenv("HELPER_LOG"); log != "" {
		f, _ := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		fmt.Fprintln(f, strings.Join(args, " "))
		f.Close()
	}
	switch fault := os.Getenv("HELPER_FAULT"); fault {
	case "":
	case "break", "break in a line", "break behind a line":
		// The first HELPER_BREAKS processes lose their connection.
		said, _ := os.ReadFile(os.Getenv("HELPER_LOG"))
		breaks, _ := strconv.Atoi(os.Getenv("HELPER_BREAKS"))
		if bytes.Count(said, []byte("\n")) > breaks {
			break
		}
		fmt.Print(map[string]string{"break": "", "break in a line": `{"digest":"sha256:`, "break behind a line": "name\n"}[fault])
		fmt.Fprintln(os.Stderr, "dist-remote-test: the connection broke")
		return 6
	case "hang":
		fmt.Println("begun")
		time.Sleep(time.Hour)
	case "long line":
		os.Stdout.Write(bytes.Repeat([]byte("x"), 2*maxHelperLine))
		return 0
	case "endless":
		for {
			if _, err := fmt.Println("name"); err != nil {
				return 1
			}
		}
	case "leave":
		// The helper leaves a process running that has its standard error. The first helper of a batch dies within a
		// response, and leaves a process that has its input and output.
		said, _ := os.ReadFile(os.Getenv("HELPER_LOG"))
		c := exec.Command("cat", os.Getenv("HELPER_FIFO"))
		switch {
		case verb != "batch-fetch":
			c.Stderr = os.Stderr
			_ = c.Start()
		case strings.Count(string(said), verb) == 1:
			c.Stdin, c.Stdout = os.Stdin, os.Stdout
			_ = c.Start()
			_ = FetchBatch(ctx, &Layout{dir: address}, os.Stdin, &limited{os.Stdout, 4 << 20})
			return 6
		}
	default:
		fmt.Print(fault)
		return 0
	}
	if lacks := os.Getenv("HELPER_LACKS"); lacks != "" && strings.HasPrefix(verb, lacks) {
		return 10
	}
	l := &Layout{dir: address}
	var err error
	if ignored := os.Getenv("HELPER_IGNORES"); ignored != "" {
		rest = slices.DeleteFunc(rest, func(hint string) bool { return strings.HasPrefix(hint, ignored) })
		if strings.HasPrefix(verb, "batch") {
			return ignoring(ctx, ignored, l)
		}
	}
	switch verb {
	case "resolve":
		var desc ocispec.Descriptor
		if desc, err = l.Resolve(ctx, rest[0]); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(desc)
		}
	case "fetch":
		var body io.ReadCloser
		if body, err = l.Fetch(ctx, rest[0], rest[1:]...); err == nil {
			_, err = io.Copy(os.Stdout, body)
		}
	case "put":
		var pushed Pushed
		if pushed, err = l.Push(ctx, rest[0], os.Stdin, rest[1:]...); err == nil && pushed.State == Exists {
			fmt.Println("exists")
		}
	case "batch-fetch":
		err = FetchBatch(ctx, l, os.Stdin, os.Stdout)
	case "batch-put":
		err = PutBatch(ctx, l, os.Stdin, os.Stdout)
	case "tags":
		for name, terr := range l.Tags(ctx) {
			if err = terr; err == nil {
				fmt.Println(name)
			}
		}
	case "referrers":
		for desc, rerr := range l.Referrers(ctx, digest.Digest(rest[0]), ReferrerFilter{}) {
			if err = rerr; err == nil {
				err = json.NewEncoder(os.Stdout).Encode(desc)
			}
		}
	case "delete":
		err = l.Delete(ctx, rest[0])
	default:
		return 10
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "dist-remote-test:", err)
		return errclass.Status(err)
	}
	return 0
}

// ignoring serves a batch, and drops hints that begin with a prefix.
func ignoring(ctx context.Context, hint string, l *Layout) int {
	r, w := io.Pipe()
	go func() {
		s := bufio.NewScanner(os.Stdin)
		for s.Scan() {
			words := slices.DeleteFunc(strings.Split(s.Text(), " "), func(word string) bool { return strings.HasPrefix(word, hint) })
			fmt.Fprintln(w, strings.Join(words, " "))
		}
		w.Close()
	}()
	return errclass.Status(FetchBatch(ctx, l, r, os.Stdout))
}

// limited is a writer that fails after that many bytes.
type limited struct {
	io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n, err := l.Writer.Write(p[:min(len(p), l.left)])
	if l.left -= n; err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return n, err
}

// helper opens a directory as a remote of the helper.
func helper(t *testing.T, dir string) Remote {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.Symlink(exe, filepath.Join(bin, "dist-remote-test")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("GORACE", "atexit_sleep_ms=0") // the default is one second per process
	r, err := Open("test::"+dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestHelper(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "x")
	want := layout(t, dir, "example.org/x:1", "example.org/x:2")
	r := helper(t, dir)
	if desc, err := r.Resolve(ctx, "1"); err != nil || desc.Digest != want.Digest {
		t.Fatalf("%+v, %v", desc, err)
	}
	blob := noise(3 << 20)
	id := digest.FromBytes(blob).String()
	for _, state := range []State{Stored, Exists} {
		pushed, err := r.Push(ctx, id, bytes.NewReader(blob))
		if err != nil || pushed.State != state || pushed.Size != int64(len(blob)) {
			t.Fatalf("%+v, %v", pushed, err)
		}
	}
	for _, offset := range []int{0, 1, len(blob) - 1, len(blob)} {
		got, err := fetch(t, r, id, fmt.Sprintf("offset:%d", offset))
		if err != nil || !bytes.Equal(got, blob[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, len(got), err)
		}
	}

	// Referrers are listed by type or all, also if the manifest was put by its digest.
	artifact := func(kind string) ocispec.Descriptor {
		b, _ := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: kind, Subject: &want, Layers: []ocispec.Descriptor{}})
		pushed, err := r.Push(ctx, digest.FromBytes(b).String(), bytes.NewReader(b), "mediatype:"+ocispec.MediaTypeImageManifest)
		if err != nil {
			t.Fatal(err)
		}
		return pushed.Descriptor
	}
	artifacts := []ocispec.Descriptor{artifact("application/a"), artifact("application/b"), artifact("application/a")}
	for kind, n := range map[string]int{"": 2, "application/a": 1, "application/none": 0} {
		found := 0
		for desc, err := range r.Referrers(ctx, want.Digest, ReferrerFilter{ArtifactType: kind}) {
			if err != nil || kind != "" && desc.ArtifactType != kind || desc.MediaType != ocispec.MediaTypeImageManifest {
				t.Fatalf("%+v, %v", desc, err)
			}
			found++
		}
		if found != n {
			t.Errorf("%d referrers of type %q, want %d", found, kind, n)
		}
	}
	for _, err := range r.Referrers(ctx, digest.FromString("none"), ReferrerFilter{}) {
		t.Errorf("a referrer of what is not there: %v", err)
	}

	// One tag is deleted and the other stays. Deleting a manifest by its digest deletes its tags.
	tags := func() (list []string) {
		for name, err := range r.Tags(ctx) {
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, name)
		}
		return list
	}
	if err := r.Delete(ctx, "example.org/x:1"); err != nil {
		t.Fatal(err)
	}
	if got := tags(); !slices.Equal(got, []string{"example.org/x:2"}) {
		t.Error(got)
	}
	is(t, r.Delete(ctx, "example.org/x:1"), errdefs.IsNotFound)
	if err := r.Delete(ctx, want.Digest.String()); err != nil || len(tags()) != 0 {
		t.Error(err, tags())
	}
	if err := r.Delete(ctx, artifacts[0].Digest.String()); err != nil {
		t.Fatal(err)
	}
	for desc, err := range r.Referrers(ctx, want.Digest, ReferrerFilter{ArtifactType: "application/a"}) {
		t.Errorf("a referrer that was deleted: %+v, %v", desc, err)
	}
	// Arguments that a helper could read as flags are not passed to it.
	log := filepath.Join(t.TempDir(), "log")
	t.Setenv("HELPER_LOG", log)
	for _, bad := range []string{"-x", "", "a b", "a\nb", "sha256:x"} {
		if err := r.Delete(ctx, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if b, err := os.ReadFile(log); err == nil {
		t.Errorf("the helper was called: %s", b)
	}
}

// Headers may be secrets of a registry. A helper gets them neither from an option nor from the environment.
func TestHelperGetsNoHeaders(t *testing.T) {
	bin := t.TempDir()
	log := filepath.Join(bin, "log")
	if err := os.WriteFile(filepath.Join(bin, "dist-remote-env"), []byte("#!/bin/sh\nenv >'"+log+"'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("DIST_HEADERS", "/secret/file")
	t.Setenv("HELPER_OTHER", "kept")
	r, err := Open("env::x", Options{Headers: []string{"X-Key: /secret/value"}, CA: []string{"ca.pem"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range r.Tags(context.Background()) {
		t.Fatal(err)
	}
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(string(b), "\n")
	if strings.Contains(string(b), "/secret/") || !slices.Contains(got, "HELPER_OTHER=kept") || !slices.Contains(got, "DIST_CA=ca.pem") {
		t.Errorf("the helper's environment:\n%s", b)
	}
}

func TestHelperThatLies(t *testing.T) {
	ctx := context.Background()
	r := helper(t, t.TempDir())
	subject := digest.FromString("x")
	referrers := func() (err error) {
		for _, e := range r.Referrers(ctx, subject, ReferrerFilter{}) {
			err = errors.Join(err, e)
		}
		return err
	}
	tags := func() (n int, err error) {
		for _, e := range r.Tags(ctx) {
			if n++; e != nil {
				err = e
			}
		}
		return n, err
	}
	for _, fault := range []string{"no descriptor\n", "{}\n", `{"digest":"sha256:x"}`, fmt.Sprintf(`{"digest":%q,"size":-1}`, subject), "long line"} {
		t.Setenv("HELPER_FAULT", fault)
		is(t, referrers(), errdefs.IsDataLoss)
	}
	for _, fault := range []string{"a b\n", "\x1b[31m\n", "\n", "long line", "endless"} {
		t.Setenv("HELPER_FAULT", fault)
		n, err := tags()
		is(t, err, errdefs.IsDataLoss)
		if n > maxListed+1 {
			t.Errorf("%q: %d tags", fault, n)
		}
	}
	t.Setenv("HELPER_FAULT", "other bytes")
	_, err := fetch(t, r, subject.String())
	is(t, err, errdefs.IsDataLoss)
	_, err = fetch(t, r, subject.String(), "size:3")
	is(t, err, errdefs.IsDataLoss)
}

// A helper whose connection breaks is started again, up to a bounded number of times.
func TestHelperWhoseLinkBreaks(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "x")
	want := layout(t, dir, "example.org/x:1")
	r := helper(t, dir)
	calls := func(fault, breaks string, call func() error) (int, error) {
		t.Helper()
		log := filepath.Join(t.TempDir(), "log")
		t.Setenv("HELPER_LOG", log)
		t.Setenv("HELPER_FAULT", fault)
		t.Setenv("HELPER_BREAKS", breaks)
		err := call()
		b, rerr := os.ReadFile(log)
		if rerr != nil {
			t.Fatal(rerr)
		}
		return bytes.Count(b, []byte("\n")), err
	}
	resolve := func() error {
		desc, err := r.Resolve(ctx, "1")
		if err == nil && desc.Digest != want.Digest {
			err = fmt.Errorf("%+v", desc)
		}
		return err
	}
	tags := func() (err error) {
		var got []string
		for name, e := range r.Tags(ctx) {
			got, err = append(got, name), e
		}
		if err == nil && !slices.Equal(got, []string{"example.org/x:1"}) {
			err = fmt.Errorf("%q", got)
		}
		return err
	}
	referrers := func() error {
		for _, err := range r.Referrers(ctx, want.Digest, ReferrerFilter{}) {
			return cmp.Or(err, errors.New("there is none"))
		}
		return nil
	}
	for what, call := range map[string]func() error{"resolve": resolve, "tags": tags, "referrers": referrers} {
		if n, err := calls("break", "2", call); n != 3 || err != nil {
			t.Errorf("%s: %d calls, %v", what, n, err)
		}
		if n, err := calls("break", "99", call); n != helperTries || !errdefs.IsAborted(err) || !strings.Contains(err.Error(), "the connection broke") {
			t.Errorf("%s, for ever: %d calls, %v", what, n, err)
		}
	}
	if n, err := calls("break in a line", "2", resolve); n != 3 || err != nil {
		t.Errorf("resolve, in a line: %d calls, %v", n, err)
	}
	// A list is passed to the caller as it arrives, so it can't be started again.
	if n, err := calls("break behind a line", "2", tags); n != 1 || !errdefs.IsAborted(err) {
		t.Errorf("tags, behind a line: %d calls, %v", n, err)
	}
}

// A caller that gives up ends the helper, and does not wait for it.
func TestHelperIsEnded(t *testing.T) {
	r := helper(t, t.TempDir())
	t.Setenv("HELPER_FAULT", "hang")
	for _, call := range []func(context.Context) error{
		func(ctx context.Context) error { _, err := r.Resolve(ctx, "x"); return err },
		func(ctx context.Context) error { return r.Delete(ctx, "x") },
		func(ctx context.Context) (err error) {
			for _, err = range r.Tags(ctx) {
			}
			return err
		},
		func(ctx context.Context) (err error) {
			for _, err = range r.Referrers(ctx, digest.FromString("x"), ReferrerFilter{}) {
				if errdefs.IsDataLoss(err) { // "begun" has no such error
					<-ctx.Done()
					err = context.Cause(ctx)
				}
			}
			return err
		},
		func(ctx context.Context) error {
			_, err := r.Push(ctx, digest.FromString("x").String(), strings.NewReader("x"))
			return err
		},
	} {
		why := errclass.As(errors.New("enough"), errdefs.ErrAborted)
		ctx, cancel := context.WithCancelCause(context.Background())
		time.AfterFunc(50*time.Millisecond, func() { cancel(why) })
		if err := call(ctx); !errdefs.IsAborted(err) || !strings.Contains(err.Error(), "enough") {
			t.Errorf("ended with %v", err)
		}
	}
	// When a consumer stops reading, no process is left running.
	t.Setenv("HELPER_FAULT", "endless")
	for range r.Tags(context.Background()) {
		break
	}
	body, err := r.Fetch(context.Background(), digest.FromString("x").String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := body.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	body.Close()
}

// Several calls of each verb at the same time, on one remote.
func TestHelperConcurrently(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "x")
	want := layout(t, dir, "example.org/x:1")
	r := helper(t, dir)
	var group sync.WaitGroup
	for i := range 4 {
		group.Go(func() {
			blob := noise(200_000 + i)
			id := digest.FromBytes(blob).String()
			if _, err := r.Push(ctx, id, bytes.NewReader(blob), "size:"+fmt.Sprint(len(blob))); err != nil {
				t.Error(err)
			}
			if got, err := fetch(t, r, id); err != nil || !bytes.Equal(got, blob) {
				t.Error(err)
			}
			// Wrong bytes and wrong sizes of objects that other calls may be putting.
			if _, err := r.Push(ctx, digest.FromString("none").String(), bytes.NewReader(blob)); !errdefs.IsDataLoss(err) {
				t.Error(err)
			}
			b, _ := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: fmt.Sprintf("a/%d", i), Subject: &want})
			tag := fmt.Sprintf("tag:%d", i)
			if _, err := r.Push(ctx, tag, bytes.NewReader(b)); err != nil {
				t.Error(err)
			}
			if _, err := r.Resolve(ctx, tag); err != nil {
				t.Error(err)
			}
			for _, err := range r.Referrers(ctx, want.Digest, ReferrerFilter{}) {
				if err != nil {
					t.Error(err)
				}
			}
			if err := r.Delete(ctx, tag); err != nil {
				t.Error(err)
			}
			for _, err := range r.Tags(ctx) {
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if _, err := os.Stat(filepath.Join(dir, ondisk.BlobName(digest.FromString("none")))); err == nil {
		t.Error("wrong bytes were stored")
	}
}
