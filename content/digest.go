package content

import (
	"crypto/sha256"
	"crypto/sha512"
	"hash"
	"strings"

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

// valid reports whether hex is the encoded part of a digest with a supported algorithm.
func valid(alg digest.Algorithm, hex string) bool {
	if size, ok := hexSize[alg]; !ok || len(hex) != size {
		return false
	}
	return strings.Trim(hex, "0123456789abcdef") == ""
}
