package content_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"distkit/content"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func init() {
	// write REF DIGEST TEXT: opens a writer, writes, and prints a line. It commits when it reads a line.
	jobs["write"] = func(s *content.Store, args []string) error {
		ctx := context.Background()
		w, err := s.Writer(ctx, args[0], 0, digest.Digest(args[1]), content.Wait)
		if errdefs.IsAlreadyExists(err) {
			fmt.Println("exists")
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write([]byte(args[2])[w.Offset():]); err != nil {
			return err
		}
		fmt.Println("written")
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			return err
		}
		return w.Commit(ctx, 0, "", nil)
	}
	// label DIGEST KEY N: sets one label, which no other process sets, to 1, 2, … N.
	jobs["label"] = func(s *content.Store, args []string) error {
		n, err := strconv.Atoi(args[2])
		for i := 1; i <= n && err == nil; i++ {
			_, err = s.Update(context.Background(), content.Info{
				Digest: digest.Digest(args[0]), Labels: map[string]string{args[1]: strconv.Itoa(i)},
			}, "labels."+args[1])
		}
		return err
	}
	// churn TEXT N: stores and deletes a blob N times.
	jobs["churn"] = func(s *content.Store, args []string) error {
		n, err := strconv.Atoi(args[1])
		dgst := digest.FromString(args[0])
		for i := 0; i < n && err == nil; i++ {
			_, err = content.WriteBlob(context.Background(), s, "churn"+strconv.Itoa(os.Getpid()), strings.NewReader(args[0]), 0, dgst)
			if err == nil {
				if err = s.Delete(context.Background(), dgst); errdefs.IsNotFound(err) {
					err = nil
				}
			}
		}
		return err
	}
}

// TestStore has what containerd's suite, which testdata/conformance runs, does not test: aborts, deletions, walks and
// filters, the list of statuses, and locks that exclude other processes and end with theirs. A store's state is in its
// directory alone, so the tests also open it twice, or in two processes.
func TestStore(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		f    func(*suite)
	}{
		{"Abort", (*suite).abort},
		{"AbortIsRefusedWhileAWriterIsThere", (*suite).abortBusy},
		{"AbortTakesAllOfARef", (*suite).abortAll},
		{"Delete", (*suite).delete},
		{"DeleteAndStoreByManyProcesses", (*suite).churn},
		{"Walk", (*suite).walk},
		{"WalkWhileBlobsGo", (*suite).walkDeleting},
		{"Filters", (*suite).filters},
		{"ListStatuses", (*suite).listStatuses},
		{"AWriterExcludesOtherProcesses", (*suite).excludes},
		{"ALockEndsWithItsProcess", (*suite).killed},
		{"AWriterOfADigestIsWaitedFor", (*suite).waits},
		{"LabelsByManyProcesses", (*suite).labels},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := &suite{T: t, root: filepath.Join(t.TempDir(), "store")}
			s.Store = open(t, s.root)
			c.f(s)
		})
	}
}

// suite is one test, which has a store of its own.
type suite struct {
	*testing.T
	*content.Store
	root string
}

// again opens the store once more, as another process would.
func (s *suite) again() *content.Store {
	s.Helper()
	return open(s.T, s.root)
}

func (s *suite) ok(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// want checks that an error has a class.
func (s *suite) want(what string, is func(error) bool, err error) {
	s.Helper()
	if !is(err) {
		s.Errorf("%s: %v", what, err)
	}
}

func (s *suite) put(text string) digest.Digest {
	s.Helper()
	return put(s.T, s.Store, []byte(text))
}

// leave starts an ingest and closes it.
func (s *suite) leave(ref, text string) {
	s.Helper()
	leave(s.T, s.Store, ref, text)
}

// wantText checks that a blob is stored and has a text.
func (s *suite) wantText(dgst digest.Digest, text string) {
	s.Helper()
	wantBlob(s.T, s.Store, dgst, []byte(text))
}

func (s *suite) start(job string, args ...string) *process {
	s.Helper()
	return start(s.T, s.Store, job, args...)
}

// says checks the next line that the other process prints.
func (s *suite) says(p *process, want string) {
	s.Helper()
	if line := p.line(); line != want {
		s.Fatalf("the other process says %q, not %q", line, want)
	}
}

// commit lets a process that writes continue, and waits for its end.
func (s *suite) commit(p *process) {
	s.Helper()
	_, err := io.WriteString(p.in, "\n")
	s.ok(errors.Join(err, p.Wait()))
}

func (s *suite) abort() {
	s.want("abort of nothing", errdefs.IsNotFound, s.Abort(s.Context(), "ref"))
	s.leave("ref", "some")
	s.ok(s.again().Abort(s.Context(), "ref"))
	s.want("abort of what is aborted", errdefs.IsNotFound, s.Abort(s.Context(), "ref"))
	_, err := s.Status(s.Context(), "ref")
	s.want("status of what is aborted", errdefs.IsNotFound, err)
	w, err := s.Writer(s.Context(), "ref", 0, "")
	s.ok(err)
	defer w.Close()
	if w.Offset() != 0 || w.Digest() != digest.FromString("") {
		s.Errorf("what was aborted goes on at %d", w.Offset())
	}
	// The writer itself drops the ingest.
	_, err = w.Write([]byte("more"))
	s.ok(errors.Join(err, w.Abort(), w.Close()))
	if _, err := w.Write([]byte("x")); err == nil {
		s.Error("an aborted writer writes")
	}
	if list, err := s.ListStatuses(s.Context()); err != nil || len(list) != 0 {
		s.Errorf("left: %+v, %v", list, err)
	}
	s.want("abort of a stored blob", errdefs.IsNotFound, s.Abort(s.Context(), string(s.put("blob"))))
}

func (s *suite) abortBusy() {
	w, err := s.Writer(s.Context(), "here", 0, "")
	s.ok(err)
	defer w.Close()
	p := s.start("write", "there", "", "text")
	s.says(p, "written")
	for _, ref := range []string{"here", "there"} {
		s.want("abort of "+ref, errdefs.IsUnavailable, s.again().Abort(s.Context(), ref))
	}
	s.commit(p)
	s.wantText(digest.FromString("text"), "text")
}

// Several ingests may have the same ref, if their digests differ.
func (s *suite) abortAll() {
	for _, text := range []string{"one", "two"} {
		w, err := s.Writer(s.Context(), "ref", 0, digest.FromString(text))
		s.ok(err)
		_, err = w.Write([]byte(text[:1]))
		s.ok(errors.Join(err, w.Close()))
	}
	s.leave("other", "x")
	s.ok(s.Abort(s.Context(), string(digest.FromString("one"))))
	st, err := s.Status(s.Context(), "ref")
	if err != nil || st.Expected != digest.FromString("two") {
		s.Errorf("%+v, %v", st, err)
	}
	s.ok(s.Abort(s.Context(), "ref"))
	list, err := s.ListStatuses(s.Context())
	if err != nil || len(list) != 1 || list[0].Ref != "other" {
		s.Errorf("%+v, %v", list, err)
	}
}

func (s *suite) delete() {
	absent := digest.FromString("absent")
	s.want("delete of nothing", errdefs.IsNotFound, s.Delete(s.Context(), absent))
	s.want("delete of no digest", errdefs.IsInvalidArgument, s.Delete(s.Context(), "sha256:../../x"))
	dgst, other := s.put("text"), s.put("other")
	_, err := s.Update(s.Context(), content.Info{Digest: dgst, Labels: map[string]string{"a": "1"}})
	s.ok(err)
	r, err := s.File(dgst)
	s.ok(err)
	defer r.Close()
	s.ok(s.again().Delete(s.Context(), dgst))
	s.want("delete of what is deleted", errdefs.IsNotFound, s.Delete(s.Context(), dgst))
	_, err = s.Info(s.Context(), dgst)
	s.want("info of what is deleted", errdefs.IsNotFound, err)
	_, err = s.File(dgst)
	s.want("a reader of what is deleted", errdefs.IsNotFound, err)
	_, err = s.Update(s.Context(), content.Info{Digest: dgst, Labels: map[string]string{"b": "1"}})
	s.want("labels of what is deleted", errdefs.IsNotFound, err)
	b := make([]byte, 4)
	if n, err := r.ReadAt(b, 0); n != 4 || err != nil && err != io.EOF || string(b) != "text" || r.Size() != 4 {
		s.Errorf("who has it open reads %q, %v", b[:n], err)
	}
	if again := s.put("text"); again != dgst {
		s.Errorf("stored again as %s", again)
	}
	if info, err := s.Info(s.Context(), dgst); err != nil || len(info.Labels) != 0 {
		s.Errorf("stored again, it has the labels of before: %v, %v", info.Labels, err)
	}
	s.wantText(other, "other")
}

func (s *suite) churn() {
	var all []*process
	for range 4 {
		all = append(all, s.start("churn", strings.Repeat("x", 10_000), "50"))
	}
	for _, p := range all {
		if err := p.Wait(); err != nil {
			s.Errorf("a process: %v", err)
		}
	}
	if list, err := s.ListStatuses(s.Context()); err != nil || len(list) != 0 {
		s.Errorf("left: %+v, %v", list, err)
	}
	s.put(strings.Repeat("x", 10_000))
}

// infos returns all blobs, or those that match the filters.
func (s *suite) infos(expressions ...string) (found []digest.Digest) {
	s.Helper()
	filter, err := filters.ParseAll(expressions...)
	s.ok(err)
	s.ok(s.Walk(s.Context(), func(i content.Info) error {
		if filter.Match(i) {
			found = append(found, i.Digest)
		}
		return nil
	}))
	slices.Sort(found)
	return found
}

func (s *suite) walk() {
	if got := s.infos(); len(got) != 0 {
		s.Errorf("in no store: %q", got)
	}
	want := map[digest.Digest]int64{}
	for i := range 600 { // more than are read from a directory at once
		text := strings.Repeat("x", i)
		want[s.put(text)] = int64(i)
	}
	text512 := digest.SHA512.FromString("other")
	_, err := content.WriteBlob(s.Context(), s.Store, "ref", strings.NewReader("other"), 0, text512)
	s.ok(err)
	want[text512] = 5
	s.leave("left", "no blob")
	s.ok(s.Walk(s.Context(), func(i content.Info) error {
		if size, ok := want[i.Digest]; !ok || size != i.Size || time.Since(i.CreatedAt).Abs() > time.Hour || i.UpdatedAt.Before(i.CreatedAt) {
			s.Errorf("%+v", i)
		}
		delete(want, i.Digest)
		return nil
	}))
	if len(want) != 0 {
		s.Errorf("not seen: %v", want)
	}
	stop, n := errors.New("enough"), 0
	err = s.Walk(s.Context(), func(content.Info) error { n++; return stop })
	if !errors.Is(err, stop) || n != 1 {
		s.Errorf("stopped: %v after %d", err, n)
	}
	ctx, cancel := context.WithCancel(s.Context())
	err = s.Walk(ctx, func(content.Info) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		s.Errorf("cancelled: %v", err)
	}
}

func (s *suite) walkDeleting() {
	for i := range 100 {
		s.put(strconv.Itoa(i))
	}
	var all []digest.Digest
	s.ok(s.Walk(s.Context(), func(i content.Info) error {
		if slices.Contains(all, i.Digest) {
			s.Errorf("%s twice", i.Digest)
		}
		all = append(all, i.Digest)
		return s.Delete(s.Context(), i.Digest)
	}))
	if len(all) != 100 || len(s.infos()) != 0 {
		s.Errorf("%d were seen, %d are left", len(all), len(s.infos()))
	}
}

func (s *suite) filters() {
	a, b, c := s.put("a"), s.put("bb"), s.put("ccc")
	for dgst, labels := range map[digest.Digest]map[string]string{
		a: {"kind": "layer", "example.com/of.x": "1"}, b: {"kind": "config"},
	} {
		_, err := s.Update(s.Context(), content.Info{Digest: dgst, Labels: labels})
		s.ok(err)
	}
	for expression, want := range map[string][]digest.Digest{
		"digest==" + string(c):             {c},
		"digest~=^sha256:":                 {a, b, c},
		"size==2":                          {b},
		"labels.kind":                      {a, b},
		"labels.kind==layer":               {a},
		"labels.kind!=layer":               {b, c},
		"labels.kind~=^(layer|config)$":    {a, b},
		`labels."example.com/of.x"==1`:     {a},
		"labels.kind==layer,size==1":       {a},
		"labels.kind==layer,size==2":       nil,
		"labels.absent":                    nil,
		"unknown==1":                       nil,
		`digest=="` + string(b) + `",size`: {b},
	} {
		slices.Sort(want)
		if got := s.infos(expression); !slices.Equal(got, want) {
			s.Errorf("%s: %q, not %q", expression, got, want)
		}
	}
	want := []digest.Digest{a, c}
	slices.Sort(want)
	if got := s.infos("size==1", "size==3"); !slices.Equal(got, want) {
		s.Errorf("either of two: %q, not %q", got, want)
	}
}

func (s *suite) listStatuses() {
	begin := time.Now()
	s.leave("first", "12345")
	p := s.start("write", "second", string(digest.FromString("text")), "text")
	s.says(p, "written")
	w, err := s.Writer(s.Context(), "third", 10, "")
	s.ok(err)
	defer w.Close()
	s.put("a blob is none")
	list, err := s.again().ListStatuses(s.Context())
	s.ok(err)
	var got []content.Status
	for _, st := range list {
		if st.StartedAt.Before(begin.Add(-time.Second)) || st.UpdatedAt.Before(st.StartedAt.Add(-time.Second)) || time.Since(st.UpdatedAt) < -time.Second {
			s.Errorf("times of %+v", st)
		}
		st.StartedAt, st.UpdatedAt = time.Time{}, time.Time{}
		got = append(got, st)
	}
	want := []content.Status{
		{Ref: "first", Offset: 5},
		{Ref: "second", Offset: 4, Expected: digest.FromString("text"), Active: true},
		{Ref: "third", Total: 10, Active: true},
	}
	if !slices.Equal(got, want) {
		s.Errorf("%+v, not %+v", got, want)
	}
	st, err := s.Status(s.Context(), string(digest.FromString("text")))
	if err != nil || st.Ref != "second" {
		s.Errorf("by its digest: %+v, %v", st, err)
	}
	s.commit(p)
	s.ok(w.Close())
	list, err = s.ListStatuses(s.Context())
	if err != nil || len(list) != 2 || list[0].Active || list[1].Active || list[1].Ref != "third" {
		s.Errorf("at the end: %+v, %v", list, err)
	}
}

func (s *suite) excludes() {
	p := s.start("write", "ref", "", "text")
	s.says(p, "written")
	_, err := s.Writer(s.Context(), "ref", 0, "")
	s.want("a second writer", errdefs.IsUnavailable, err)
	w, err := s.Writer(s.Context(), "another ref", 0, "")
	s.ok(err)
	s.ok(w.Abort())
	s.commit(p)
	w, err = s.Writer(s.Context(), "ref", 0, "")
	s.ok(err)
	if w.Offset() != 0 {
		s.Errorf("after a commit it goes on at %d", w.Offset())
	}
	s.ok(w.Abort())
}

func (s *suite) killed() {
	dgst := digest.FromString("text and more")
	for _, expected := range []digest.Digest{"", dgst} {
		p := s.start("write", "ref", string(expected), "text")
		s.says(p, "written")
		p.kill()
		st, err := s.Status(s.Context(), "ref")
		if err != nil || st.Active || st.Offset != 4 {
			s.Errorf("of a dead process: %+v, %v", st, err)
		}
		w, err := s.Writer(s.Context(), "ref", 0, expected)
		s.ok(err)
		// An ingest that started without a digest is continued only if its bytes are certain to be on disk. Otherwise
		// it starts again.
		rest := "text and more"[w.Offset():]
		if expected != "" && w.Offset() != 4 || w.Digest() != digest.FromString("text and more"[:w.Offset()]) {
			s.Errorf("it goes on at %d, %s", w.Offset(), w.Digest())
		}
		_, err = w.Write([]byte(rest))
		s.ok(err)
		s.ok(w.Commit(s.Context(), 0, dgst, nil))
		s.wantText(dgst, "text and more")
		s.ok(s.Delete(s.Context(), dgst))
	}
}

func (s *suite) waits() {
	dgst := digest.FromString("text")
	p := s.start("write", "one", string(dgst), "text")
	s.says(p, "written")
	_, err := s.Writer(s.Context(), "two", 0, dgst)
	s.want("without waiting", errdefs.IsUnavailable, err)
	ctx, cancel := context.WithTimeout(s.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Writer(ctx, "two", 0, dgst, content.Wait); !errors.Is(err, context.DeadlineExceeded) {
		s.Errorf("waiting for too long: %v", err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if _, err := s.Writer(s.Context(), "waiter"+strconv.Itoa(i), 0, dgst, content.Wait); !errdefs.IsAlreadyExists(err) {
				s.Errorf("who waited: %v", err)
			}
		})
	}
	q := s.start("write", "three", string(dgst), "text")
	s.commit(p)
	wg.Wait()
	s.says(q, "exists")
	s.wantText(dgst, "text")
	if list, err := s.ListStatuses(s.Context()); err != nil || len(list) != 0 {
		s.Errorf("left: %+v, %v", list, err)
	}
}

func (s *suite) labels() {
	dgst := s.put("text")
	var all []*process
	want := map[string]string{}
	for i := range 4 {
		key := "key" + strconv.Itoa(i)
		want[key] = "20"
		all = append(all, s.start("label", string(dgst), key, "20"))
	}
	for _, p := range all {
		if err := p.Wait(); err != nil {
			s.Errorf("a process: %v", err)
		}
	}
	info, err := s.Info(s.Context(), dgst)
	s.ok(err)
	var got, wanted bytes.Buffer
	for i := range 4 {
		key := "key" + strconv.Itoa(i)
		fmt.Fprintln(&got, key, info.Labels[key])
		fmt.Fprintln(&wanted, key, want[key])
	}
	if got.String() != wanted.String() || len(info.Labels) != 4 {
		s.Errorf("labels are %v, not %v", info.Labels, want)
	}
}
