from rm_ood.detectors import Detector, MahalanobisDetector


def test_the_protocol_tells_detectors_from_other_objects():
    assert isinstance(MahalanobisDetector(), Detector)
    assert not isinstance(object(), Detector)
    assert not isinstance("mahalanobis", Detector)
