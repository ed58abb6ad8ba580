package remotes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing/iotest"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The content that operations write.
var (
	oddNewBlob  = append([]byte("new"), oddBlob...)
	oddManifest = []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{},"layers":[]}`)
	oddSubject  = digest.FromBytes(oddIndex)
	oddReferrer = []byte(fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"artifactType":"a/b","config":{},"layers":[],"subject":{"digest":%q}}`, ocispec.MediaTypeImageManifest, oddSubject))
)

// For writeOperations the reply is changed after the registry has done what was asked. So the client may find it done.
var writeOperations = func() []operation {
	ctx := context.Background()
	blob, manifest, referrer := digest.FromBytes(oddNewBlob), digest.FromBytes(oddManifest), digest.FromBytes(oddReferrer)
	put := func(id string, content []byte, hints ...string) func(r *Registry) (string, error) {
		return func(r *Registry) (string, error) {
			p, err := r.Push(ctx, id, iotest.HalfReader(bytes.NewReader(content)), hints...)
			return string(p.Digest), err
		}
	}
	hasBlob := func(f *fake) error {
		if !bytes.Equal(f.blobs[blob], oddNewBlob) {
			return errors.New("nothing is stored")
		}
		return nil
	}
	has := func(ids ...string) func(f *fake) error {
		return func(f *fake) error {
			for _, id := range ids {
				if _, ok := f.manifests[id]; !ok {
					return errors.New("nothing is stored")
				}
			}
			return nil
		}
	}
	lacks := func(id string) func(f *fake) error {
		return func(f *fake) error {
			if _, ok := f.manifests[id]; ok {
				return errors.New("it is there")
			}
			return nil
		}
	}
	list := referrersTag(oddSubject)
	isManifest := "mediatype:" + ocispec.MediaTypeImageManifest
	sized := []string{"mediatype:a/b", fmt.Sprintf("size:%d", len(oddNewBlob))}
	referrers := func(r *Registry) (string, error) {
		var got []string
		for d, err := range r.Referrers(ctx, oddSubject, ReferrerFilter{}) {
			if err != nil {
				return "", err
			}
			got = append(got, string(d.Digest))
		}
		return strings.Join(got, " "), nil
	}
	remove := func(id string) func(r *Registry) (string, error) {
		return func(r *Registry) (string, error) { return id, r.Delete(ctx, id) }
	}
	withReferrer := func(f *fake) {
		f.manifest("", ocispec.MediaTypeImageManifest, oddReferrer)
		f.referrers = true
	}
	withList := func(f *fake) {
		f.manifest(referrersTag(oddSubject).tag, ocispec.MediaTypeImageIndex, []byte(fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d}]}`,
			ocispec.MediaTypeImageManifest, referrer, len(oddReferrer))))
		f.referrers = false
	}
	alone := func(f *fake) { f.referrers = false }
	// A refusal of the HEAD that looks for an object is ignored: the object is put.
	look := map[string]string{"status*": right, "cut*": right, "empty body": right, "web page": right, "null": right,
		"list": right, "braces": right, "NUL": right}
	for _, status := range []int{408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524} {
		look[fmt.Sprintf("status %d*", status)] = temporary
	}
	lookForBlob := maps.Clone(look) // the blob is looked for by GET, too
	lookForBlob["status 401*"], lookForBlob["status 407*"] = refused, refused
	// A redirect with content, or one that changes the method, fails. Any other reply is a success, unless it is a
	// refusal, because the registry has done what was asked.
	done := map[string]string{"status 2*": right, "redirect*": other, "redirect 301 to nowhere": temporary, "redirect 302 to nowhere": temporary, "redirect 303 to nowhere": temporary, "cut*": right, "empty body": right, "web page": right, "null": right, "list": right,
		"braces": right, "NUL": right}
	// If the reply was lost, the blob is found. If setting a tag is refused in the way in which registries refuse to
	// change one, the tag is looked up again.
	tagged := merged(done, "status 400*", right, "status 403*", right, "status 409*", right, "status 412*", right)
	stored := maps.Clone(done)
	for _, name := range oddHeaders {
		stored[name+" with control characters"] = right
	}
	for _, status := range []int{408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524} {
		stored[fmt.Sprintf("status %d*", status)] = right
	}
	maps.Copy(stored, map[string]string{"status 404": right, "Content-Length*": right, "Transfer-Encoding*": right, "Link too large": right, "closed": right, "not HTTP": right,
		"asks to wait for garbage": right, "asks to wait for nothing": right, "asks to wait for negative": right, "asks to wait for ages": right, "redirect 301 to nowhere": right, "redirect 302 to nowhere": right,
		"redirect 303 to nowhere": right})
	// When the tag or manifest is gone, a second request finds nothing.
	gone := maps.Clone(done)
	for _, status := range []int{307, 308} {
		gone[fmt.Sprintf("redirect %d to*", status)] = notFound
		for _, where := range []string{"ftp", "garbage", "itself"} {
			gone[fmt.Sprintf("redirect %d to %s", status, where)] = other
		}
		gone[fmt.Sprintf("redirect %d to nowhere", status)] = temporary
	}
	untagged := maps.Clone(gone) // by an index made for this, on a registry that does not delete tags
	for _, status := range []int{400, 405, 501} {
		untagged[fmt.Sprintf("status %d*", status)] = notFound
	}
	// If a registry does not support the list, or sends something else, the client asks for the index under the tag.
	// Only in the former case, a missing index means that there are no referrers.
	unlisted := map[string]string{"Link garbage": damaged, "Link enormous": damaged, "status 400*": wrong, "status 404*": wrong, "status 405*": wrong, "status 501*": wrong}
	// An object that can't be read can be deleted.
	unread := map[string]string{"status*": right, "status 404*": notFound, "empty body": right, "web page": right, "null": right, "list": right, "braces": right, "NUL": right}
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, where := range []string{"clear text", "ftp", "garbage", "itself"} {
			unread[fmt.Sprintf("redirect %d to %s", status, where)] = right
		}
	}
	for _, status := range []int{408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524} {
		unread[fmt.Sprintf("status %d*", status)] = temporary
	}
	// If the reply to a chunk is unusable, the client asks how much the registry has, or else assumes that it has the
	// bytes that were sent.
	sentChunk := maps.Clone(stored)
	maps.Copy(sentChunk, map[string]string{"status 416*": right, "Location garbage": damaged, "Location enormous": temporary, "Location with control characters": right})
	asked := map[string]string{"status*": right, "status 407*": right, "cut*": right, "empty body": right, "web page": right, "null": right, "list": right, "braces": right, "NUL": right,
		"Location enormous": temporary}
	for _, status := range []int{408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524} {
		asked[fmt.Sprintf("status %d*", status)] = temporary
	}
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, where := range []string{"clear text", "ftp", "garbage", "itself"} {
			asked[fmt.Sprintf("redirect %d to %s", status, where)] = right
		}
	}
	// The outcome of cancelling an upload does not change the error for which it is cancelled.
	cancelled := map[string]string{"*": damaged}
	for _, status := range []int{301, 302, 303, 307, 308} {
		cancelled[fmt.Sprintf("redirect %d to clear text", status)] = damaged
	}
	begun := map[string]string{"Location absent": damaged, "Location empty": damaged, "Location garbage": damaged, "Location enormous": temporary, "OCI-Chunk-Min-Length enormous": other,
		"cut*": right, "empty body": right, "web page": right, "null": right, "list": right, "braces": right, "NUL": right}
	for _, status := range []int{301, 302, 303} { // these turn a POST into a GET
		begun[fmt.Sprintf("redirect %d to*", status)] = other
		begun[fmt.Sprintf("redirect %d to nowhere", status)] = temporary
	}
	return []operation{
		{name: "put a blob: whether it is a manifest", at: "HEAD /manifests/", run: put(blob.String(), oddNewBlob), want: blob.String(), check: hasBlob, isHint: true, expect: lookForBlob},
		{name: "put a blob: whether it is there", at: "HEAD /blobs/", run: put(blob.String(), oddNewBlob, sized...), want: blob.String(), check: hasBlob, isHint: true, expect: lookForBlob},
		{name: "put a blob: begin", at: "POST /blobs/uploads/", run: put(blob.String(), oddNewBlob, sized...), want: blob.String(), check: hasBlob, expect: begun},
		{name: "put a blob: mount", at: "POST /blobs/uploads/", run: put(blob.String(), oddNewBlob, append(sized, "mount:none")...), want: blob.String(), check: hasBlob, expect: begun},
		{name: "put a blob: whole", at: "PUT /blobs/uploads/", run: put(blob.String(), oddNewBlob, sized...), want: blob.String(), check: hasBlob, expect: stored},
		{name: "put a blob: last chunk", at: "PUT /blobs/uploads/", run: put(blob.String(), oddNewBlob, "mediatype:a/b"), want: blob.String(), check: hasBlob, expect: stored},
		{name: "put a blob: a chunk", at: "PATCH /blobs/uploads/", chunk: 1000, run: put(blob.String(), oddNewBlob, "mediatype:a/b"), want: blob.String(), check: hasBlob, expect: sentChunk},
		{name: "put a blob: how much of it is there", at: "GET /blobs/uploads/", chunk: 1000, lost: http.MethodPatch, run: put(blob.String(), oddNewBlob, "mediatype:a/b"), want: blob.String(), check: hasBlob, expect: asked},
		{name: "put a blob that is wrong: cancel", at: "DELETE /blobs/uploads/", run: put(blob.String(), oddBlob, "mediatype:a/b"), expect: cancelled},
		{name: "put a manifest: whether it is there", at: "HEAD /manifests/", run: put(manifest.String(), oddManifest, isManifest), want: manifest.String(), check: has(manifest.String()), isHint: true, expect: look},
		{name: "put a manifest", at: "PUT /manifests/", run: put(manifest.String(), oddManifest, isManifest), want: manifest.String(), check: has(manifest.String()), expect: done},
		{name: "put a tag: whether it is there", at: "HEAD /manifests/", run: put("v1", oddManifest), want: manifest.String(), check: has("v1"), isHint: true, expect: look},
		{name: "put a tag", at: "PUT /manifests/", run: put("v1", oddManifest), want: manifest.String(), check: has("v1"), expect: tagged},
		{name: "put a referrer: the list", at: "GET /manifests/", setup: alone, run: put("v1", oddReferrer), want: referrer.String(), check: has("v1", list.tag),
			expect: map[string]string{"status 404*": temporary}}, // put repeatedly, and never found
		{name: "put a referrer: change the list", at: "PUT /manifests/sha256-", setup: alone, run: put("v1", oddReferrer), want: referrer.String(), check: has("v1", list.tag), expect: done},
		{name: "list referrers", at: "GET /referrers/", setup: withReferrer, run: referrers, want: referrer.String(), expect: unlisted},
		{name: "list referrers by the tag", at: "GET /manifests/", setup: withList, run: referrers, want: referrer.String(), expect: map[string]string{"status 404*": wrong}},
		{name: "delete a tag", at: "DELETE /manifests/", run: remove("latest"), want: "latest", check: lacks("latest"), expect: untagged},
		{name: "delete a manifest", at: "DELETE /manifests/", run: remove(string(oddSubject)), want: string(oddSubject), check: lacks(string(oddSubject)), expect: gone},
		{name: "delete a manifest: its subject", at: "GET /manifests/", run: remove(string(oddSubject)), want: string(oddSubject), check: lacks(string(oddSubject)), expect: unread},
	}
}()
