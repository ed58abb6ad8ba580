package content

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"hash"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

var hexSize = map[digest.Algorithm]int{digest.SHA256: 2 * sha256.Size, digest.SHA512: 2 * sha512.Size}

func newHash(alg digest.Algorithm) hash.Hash {
	if alg == digest.SHA512 {
		return sha512.New()
	}
	return sha256.New()
}

// Validate returns an error if the store can't hold a blob with this digest: InvalidArgument if the digest is
// malformed, NotImplemented if its algorithm is neither sha256 nor sha512.
func Validate(dgst digest.Digest) error {
	alg, hex, ok := strings.Cut(string(dgst), ":")
	if ok && valid(digest.Algorithm(alg), hex) {
		return nil
	}
	if _, known := hexSize[digest.Algorithm(alg)]; ok && !known && dgst.Validate() != digest.ErrDigestInvalidFormat {
		return errclass.Errorf(errdefs.ErrNotImplemented, "digest %s: algorithm %s is not supported", dgst, alg)
	}
	return errclass.Errorf(errdefs.ErrInvalidArgument, "digest %q is malformed: want sha256: or sha512: and lower-case hex", string(dgst))
}

// An abbreviated digest has at least minAbbreviation digits. If it is ambiguous, the error lists at most maxCandidates digests.
const minAbbreviation, maxCandidates = 4, 5

// IsAbbreviation reports whether s can be the beginning of a digest: at least 4 hexadecimal digits, with or without their algorithm.
func IsAbbreviation(s string) bool {
	alg, hex, ok := strings.Cut(s, ":")
	if !ok {
		alg, hex = string(digest.SHA512), s
	}
	size, known := hexSize[digest.Algorithm(alg)]
	return known && len(hex) >= minAbbreviation && len(hex) < size && strings.Trim(hex, "0123456789abcdef") == ""
}

// Complete returns the whole digest for an abbreviation: that of the only blob, in the store and its alternates, whose digest begins with
// it. A whole digest is returned as it is, without a look at the store. NotFound if no blob fits; InvalidArgument, with the first
// candidates, if several do. Malformed digests get the errors of [Validate].
func (s *Store) Complete(ctx context.Context, abbreviation string) (digest.Digest, error) {
	if !IsAbbreviation(abbreviation) {
		return digest.Digest(abbreviation), Validate(digest.Digest(abbreviation))
	}
	var found []string
	add := func(dgst digest.Digest) error {
		begins := strings.HasPrefix(string(dgst), abbreviation) || strings.HasPrefix(dgst.Encoded(), abbreviation)
		if begins && len(found) <= maxCandidates && !slices.Contains(found, string(dgst)) {
			found = append(found, string(dgst))
		}
		return nil
	}
	for _, tree := range append([]disk.Tree{s.Tree}, s.Alternates...) {
		if err := (&Store{Dir: layout.Dir{Tree: tree, Name: "."}}).Digests(ctx, add); err != nil {
			return "", err
		}
	}
	switch slices.Sort(found); {
	case len(found) == 0:
		return "", errclass.Errorf(errdefs.ErrNotFound, "no blob's digest begins with %s", abbreviation)
	case len(found) > maxCandidates:
		found[maxCandidates] = "…"
		fallthrough
	case len(found) > 1:
		return "", errclass.Errorf(errdefs.ErrInvalidArgument, "%s is ambiguous: %s", abbreviation, strings.Join(found, ", "))
	}
	return digest.Digest(found[0]), nil
}

// valid reports whether hex is the encoded part of a digest with a supported algorithm.
func valid(alg digest.Algorithm, hex string) bool {
	if size, ok := hexSize[alg]; !ok || len(hex) != size {
		return false
	}
	return strings.Trim(hex, "0123456789abcdef") == ""
}
