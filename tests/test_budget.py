"""`--budget`: what would end too late does not begin, and is named."""

pytest_plugins = ["pytester"]


def test_what_does_not_fit_is_left_out_by_name(pytester):
    pytester.makepyfile(
        """
        import pytest

        def test_short(): pass

        @pytest.mark.slow(minutes=2)
        def test_fits(): pass

        @pytest.mark.slow(minutes=20)
        def test_too_long(): raise AssertionError
        """
    )
    plugins = ["-p", "budget", "-p", "no:cacheprovider", "-o", "markers=slow"]
    done = pytester.runpytest_inprocess(*plugins, "--budget", "600")
    done.assert_outcomes(passed=2, skipped=1)
    done.stdout.fnmatch_lines(["*1 not run*", "*test_too_long"])
    assert "not run" not in pytester.runpytest_inprocess(*plugins, "-k", "not too_long").stdout.str()
