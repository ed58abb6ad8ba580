package main

import (
	"cmp"
	"strings"
)

// compareVersions orders names as versions, the oldest first. Names that are not versions come first, then versions by
// their numbers, and "latest" last. Among equal numbers, one with a suffix comes first: 1.0-rc1 before 1.0 (semver.org,
// rule 11).
func compareVersions(a, b string) int {
	numbersA, suffixA, rankA := version(a)
	numbersB, suffixB, rankB := version(b)
	if c := cmp.Compare(rankA, rankB); c != 0 {
		return c
	}
	if c := compareNatural(numbersA, numbersB); c != 0 {
		return c
	}
	switch {
	case suffixA == "" && suffixB != "":
		return 1
	case suffixA != "" && suffixB == "":
		return -1
	}
	return cmp.Or(compareNatural(suffixA, suffixB), strings.Compare(a, b))
}

// version splits 1.25.3-alpine into numbers and suffix. rank is 0 for a name that is not a version, and 2 for latest.
func version(s string) (numbers, suffix string, rank int) {
	if s == "latest" {
		return "", "", 2
	}
	digits := strings.TrimPrefix(s, "v")
	if digits == "" || !isDigit(digits[0]) {
		return "", s, 0
	}
	end := strings.IndexFunc(digits, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
	if end < 0 {
		end = len(digits)
	}
	return digits[:end], digits[end:], 1
}

// compareNatural compares runs of digits as numbers of any length, and everything else as text.
func compareNatural(a, b string) int {
	for a != "" && b != "" {
		partA, partB := run(a), run(b)
		a, b = a[len(partA):], b[len(partB):]
		if isDigit(partA[0]) && isDigit(partB[0]) {
			partA, partB = strings.TrimLeft(partA, "0"), strings.TrimLeft(partB, "0")
			if c := cmp.Compare(len(partA), len(partB)); c != 0 {
				return c
			}
		}
		if c := strings.Compare(partA, partB); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(a), len(b))
}

// run returns the digits, or else the other characters, at the beginning of s.
func run(s string) string {
	end := strings.IndexFunc(s, func(r rune) bool { return isDigit(byte(min(r, 0x7f))) != isDigit(s[0]) })
	if end < 0 {
		return s
	}
	return s[:end]
}

func isDigit(b byte) bool { return '0' <= b && b <= '9' }
